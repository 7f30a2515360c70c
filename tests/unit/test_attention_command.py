"""`saescope attention`: what it writes and prints, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from activations import ActivationStore
from sae.analysis.attention.results_file import ATTENTION_FILE, read_attention
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.examination import examine
from saescope.__main__ import main
from saescope.errors import ArtefactError
from tests.tiny import D_MODEL, make_tiny_harvest, make_tiny_model

Z, OUT, RESID = (f"blocks.1.{name}" for name in ("attn.hook_z", "hook_attn_out", "hook_resid_post"))
WORDS = ("--texts", "16", "--tested", "2", "--prefix-texts", "2", "--lengths", "1", "2")


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("attention")
    make_tiny_harvest(folder, make_tiny_model(folder / "model"), sites=(Z, OUT, RESID))
    return ActivationStore.open(folder / "harvest")


def saved(harvest: ActivationStore, folder: Path, site: str) -> Path:
    torch.manual_seed(0)
    made = TopKSAE(TopKConfig(d_sae=24, k=4), D_MODEL)
    facts = harvest.manifest["model"]
    made.metadata = {
        "harvest": str(harvest.path),
        "model_spec": facts["spec"],
        "weights_hash": facts["weights_hash"],
        "site": site,
    }
    made.save(folder / "sae")
    return folder / "sae"


@pytest.mark.parametrize("site", [Z, OUT])
def test_what_it_writes(
    harvest: ActivationStore, tmp_path: Path, site: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(harvest, tmp_path, site)
    assert main(["attention", str(run), *WORDS]) == 0
    found = read_attention(run / ATTENTION_FILE)
    assert (found["site"], found["layer"], len(found["heads"])) == (site, 1, 4)
    assert found["protocol"]["texts"] == 16
    assert 16 * 8 < found["protocol"]["tokens"] <= 16 * 16
    features: dict[str, Any] = found["features"]
    rows = len(features["feature"])
    assert rows > 5
    assert min(features["firings"]) >= 10
    lists = [v for name, v in features.items() if name not in ("shares", "random_shares")]
    lists += [*features["shares"].values(), *features["random_shares"].values()]
    assert {len(each) for each in lists} == {rows}
    total = sum(each[0] for each in features["shares"].values())
    assert total == pytest.approx(1, abs=1e-3)
    assert sum(row["features"] for row in found["heads"]) == rows
    for row in found["heads"]:
        own = [h for h in features["head"] if h == row["head"]]
        assert row["features"] == len(own)
    assert [each["head"] for each in found["prefix_heads"]] == [0, 1, 2, 3]
    assert found["prefix_heads"][0]["lengths"] == [1, 2]
    printed = capsys.readouterr().out
    assert f"{site}: 16 texts" in printed
    assert "4 heads" in printed
    assert examine(run, "SAE").faults == []
    before = (run / ATTENTION_FILE).read_bytes()
    assert main(["attention", str(run), *WORDS]) == 0  # the same again, in its place
    assert (run / ATTENTION_FILE).read_bytes() == before


def test_induction_features_are_tested_beside_others(
    harvest: ActivationStore, tmp_path: Path
) -> None:
    # what is more than a token back counts as far, and repeats come first, so some go by them
    run = saved(harvest, tmp_path, Z)
    out = tmp_path / "mine.json"
    words = [*WORDS, "--near", "0", "--far", "1", "--least", "1", "--out", str(out)]
    assert main(["attention", str(run), *words]) == 0
    found = read_attention(out)
    families = dict(zip(found["features"]["feature"], found["features"]["family"], strict=True))
    for each in found["prefix"]:
        induction = families[each["feature"]] == "induction"
        assert induction == (each["chosen"] == "induction")
        assert len(each["activation"]["effect"]) == 2
    kinds = [each["chosen"] for each in found["prefix"]]
    assert kinds.count("induction") == kinds.count("other")


def test_what_is_refused(
    harvest: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = saved(harvest, tmp_path / "resid", RESID)
    assert main(["attention", str(elsewhere), *WORDS]) == 2
    assert "belong to attention heads only where attention's outputs are" in capsys.readouterr().err
    run = saved(harvest, tmp_path, Z)
    assert main(["attention", str(run), "--texts", "100000"]) == 2
    assert "the harvest has fewer sequences" in capsys.readouterr().err
    for words in (["--texts", "3"], ["--far", "2"]):
        with pytest.raises(SystemExit, match="2"):
            main(["attention", str(run), *words])
    capsys.readouterr()
    assert main(["attention", str(run), *WORDS[:6], "--lengths", "2", "1"]) == 2
    said = capsys.readouterr()
    assert "must grow" in said.err
    assert "texts" not in said.out  # before anything is measured
    (run / ATTENTION_FILE).write_text(json.dumps({"mine": 1}))
    assert main(["attention", str(run), *WORDS]) == 2
    assert "never replaced" in capsys.readouterr().err
    assert [fault[0] for fault in examine(run, "SAE").faults] == [ATTENTION_FILE]


def test_a_damaged_file_is_told(harvest: ActivationStore, tmp_path: Path) -> None:
    run = saved(harvest, tmp_path, Z)
    assert main(["attention", str(run), *WORDS]) == 0
    path = run / ATTENTION_FILE
    path.write_text(path.read_text().replace('"texts": 16', '"texts": 17'))
    with pytest.raises(ArtefactError, match="does not match its own sha256"):
        read_attention(path)
    assert examine(run, "SAE").faults[0][0] == ATTENTION_FILE
