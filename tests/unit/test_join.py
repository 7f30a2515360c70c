"""Two harvests of one text joined, and what a crosscoder over them says of the two models."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sae
from activations import ActivationStore
from activations.harvesting.join import join
from sae.commands.diff_models import read_model_diff
from sae.training.config import TrainConfig
from sae.training.trainer_config import TrainerConfig
from saescope.__main__ import main
from saescope.errors import ArtefactError, InputError
from tests.sealing import change_sealed
from tests.tiny import make_tiny_harvest, make_tiny_model

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Harvests base/harvest and tuned/harvest: two tiny models, one text."""
    root = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("base", "tuned")):
        make_tiny_harvest(root / name, make_tiny_model(root / f"{name}-model", seed=seed))
    return root


def rows_of(store: ActivationStore, site: str) -> dict[int, torch.Tensor]:
    found = {}
    for split in ("train", "held_out"):
        for chunk in store.chunks(split):
            x, row_token = store.read_chunk(site, chunk.index)
            found |= dict(zip(row_token.tolist(), x, strict=True))
    return found


def test_a_joined_store_has_the_rows_of_both(two: Path, tmp_path: Path) -> None:
    paths = {name: two / name / "harvest" for name in ("base", "tuned")}
    joined = join(tmp_path / "both", paths)
    assert joined.sites == (f"base:{SITE}", f"tuned:{SITE}")
    assert joined.verify() > 10
    for name, path in paths.items():
        one = ActivationStore.open(path)
        mine, theirs = rows_of(joined, f"{name}:{SITE}"), rows_of(one, SITE)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[token], theirs[token]) for token in mine)
        np.testing.assert_array_equal(np.asarray(joined.tokens), np.asarray(one.tokens))
        statistics = joined.statistics(f"{name}:{SITE}")
        np.testing.assert_array_equal(statistics.mean, one.statistics(SITE).mean)
        titles = [store.document_table()["title"].to_pylist() for store in (joined, one)]
        assert titles[0] == titles[1]
    facts = joined.manifest["joined"]
    assert facts["tuned"]["harvest_hash"] == ActivationStore.open(paths["tuned"]).hash
    # hard links: no disk, and the joined store outlives what it was made of
    chunk = next((tmp_path / "both" / "activations.zarr" / f"tuned:{SITE}" / "c").iterdir()) / "0"
    assert chunk.stat().st_nlink > 1


def test_the_command(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harvests = [str(two / name / "harvest") for name in ("base", "tuned")]
    words = ["join", *harvests, "--out", str(tmp_path / "both")]
    assert main(words) == 2
    assert "no two alike" in capsys.readouterr().err
    assert main([*words, "--names", "base", "tuned"]) == 0
    assert f"at base:{SITE}, tuned:{SITE}" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "both")]) == 0
    assert main([*words, "--names", "base", "tuned"]) == 2
    assert "never replaced" in capsys.readouterr().err
    assert main([*words, "--names", "base", "a/b"]) == 2
    assert main([*words, "--names", "base"]) == 2
    assert "one name a harvest" in capsys.readouterr().err


X = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(400).reshape(20, 20)


def brought(folder: Path, **options: Any) -> Path:
    """A store of the same rows, without a model."""
    settings = {"tokens": TOKENS, "chunk_rows": 64, "window_chunks": 2, "held_out_fraction": 0.2}
    ActivationStore.from_arrays(folder, {"x": X}, **{**settings, **options})
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": TOKENS + 1}, "their tokens differ: harvest the same corpus"),
        ({"keep": TOKENS % 7 > 0}, "keep other positions"),
        ({"documents": torch.arange(20) // 2}, "documents differ|tokens differ"),
        ({"seed": 1}, "tokens differ|another order: harvest with the same seed"),
        ({"window_chunks": 1}, "another order: harvest with the same seed, chunk_rows and window"),
        ({"chunk_rows": 32}, "chunk_rows differs .given: 32; allowed: 64"),
        ({"tokens": TOKENS.reshape(40, 10)}, "context differs .given: 10; allowed: 20"),
        ({"storage": "bfloat16"}, "storage differs .given: 'bfloat16'; allowed: float32"),
        ({"held_out_fraction": 0.5}, "their tokens differ"),
    ],
)
def test_what_is_of_other_text_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    one, other = brought(tmp_path / "one"), brought(tmp_path / "other", **options)
    with pytest.raises(InputError, match=message):
        join(tmp_path / "both", {"one": one, "other": other})
    assert not (tmp_path / "both").exists()
    join(tmp_path / "both", {"one": one, "again": one})


def test_a_harvest_without_rows_is_refused(two: Path, tmp_path: Path) -> None:
    other = make_tiny_harvest(tmp_path / "other", two / "tuned-model", storage="none")
    with pytest.raises(InputError, match="stores no rows"):
        join(tmp_path / "both", {"base": two / "base" / "harvest", "tuned": other})


def test_other_tokenizers_and_unfinished_harvests_are_refused(two: Path, tmp_path: Path) -> None:
    harvest = Path(shutil.copytree(two / "tuned" / "harvest", tmp_path / "tuned"))
    for change, message in (
        ({"model": {"tokenizer_hash": "f00d"}}, "its tokenizer is not that of .*given: 'f00d'"),
        ({"complete": False}, "not finished"),
    ):
        change_sealed(harvest / "manifest.json", lambda facts, more=change: facts.update(more))
        with pytest.raises(InputError, match=message):
            join(tmp_path / "both", {"base": two / "base" / "harvest", "tuned": harvest})


def test_what_cannot_be_joined_at_all(two: Path, tmp_path: Path) -> None:
    harvest = Path(shutil.copytree(two / "base" / "harvest", tmp_path / "base"))
    with pytest.raises(InputError, match="may not lie in what is read"):
        join(harvest / "both", {"a": harvest, "b": two / "tuned" / "harvest"})
    with pytest.raises(ArtefactError):
        join(tmp_path / "both", {"a": harvest, "b": tmp_path / "nothing"})
    with pytest.raises(InputError, match="two harvests or more"):
        join(tmp_path / "both", {"a": harvest})


def test_what_is_no_crosscoder_over_two_models(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"harvest": str(two / "base" / "harvest"), "out": str(tmp_path / "run"), "passes": 1.0}
    sae.train(TrainConfig(**config, trainer=TrainerConfig(batch_size=64)))
    assert main(["diff-models", str(tmp_path / "run")]) == 2
    assert "is no crosscoder" in capsys.readouterr().err
    with pytest.raises(ArtefactError, match="saescope diff-models RUN"):
        read_model_diff(tmp_path / "run")
