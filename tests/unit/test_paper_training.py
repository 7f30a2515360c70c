"""What trials of papers share: harvests beside their folders, runs that are gone on with."""

from pathlib import Path
from typing import Any

import pytest

from activations import ActivationStore
from sae.reproduction import training
from sae.reproduction.training import harvested, measured, trained
from saescope.errors import InputError
from tests.tiny import make_tiny_corpus, make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """papers/mine, beside a harvest of a tiny model."""
    root = tmp_path_factory.mktemp("papers")
    model, corpus = make_tiny_model(root / "model"), make_tiny_corpus(root / "text", 30)
    example = root / "tiny.toml"
    example.write_text(
        f'max_tokens = 500\nsites = ["blocks.1.hook_resid_post"]\nout = "elsewhere"\n'
        f'context = 16\nheld_out_fraction = 0.2\nmodel.spec = "{model}"\n'
        f'corpus.source = "{corpus}"\n'
    )
    return root / "mine"


@pytest.fixture
def harvest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {"configs/harvest/tiny.toml": folder.parent / "tiny.toml"}
    monkeypatch.setattr(training, "examples", lambda: files)
    return harvested(folder, "tiny")


def values(harvest: Path, **more: Any) -> dict[str, Any]:
    return {
        "harvest": str(harvest),
        "passes": 1.0,
        "evaluation_rows": 64,
        "sae": {"kind": "batchtopk", "d_sae": 48, "k": 4},
        "trainer": {"batch_size": 64},
        **more,
    }


def test_papers_share_a_harvest_and_changes_are_another(folder: Path, harvest: Path) -> None:
    assert harvest == folder.parent / "harvests" / "tiny"
    assert harvested(folder.parent / "other", "tiny") == harvest
    fewer = harvested(folder, "tiny", max_tokens=200)
    assert fewer.name == "tiny-max_tokens-200"
    rows = [ActivationStore.open(str(each)).n_rows("train") for each in (fewer, harvest)]
    assert rows[0] < 250 < rows[1]


def test_a_run_is_trained_once_and_measured_on_what_was_held_out(
    folder: Path, harvest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(folder / "run", values(harvest))
    written = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert written
    assert trained(folder / "run", values(harvest)) == run
    assert {path: path.stat().st_mtime_ns for path in written} == written
    found = measured(run, tokens=0)["reconstruction"]
    assert found["rows"] == ActivationStore.open(str(harvest)).n_rows("held_out")
    assert measured(run, tokens=0)["reconstruction"]["fvu"] == found["fvu"]
    assert capsys.readouterr().out == ""


def test_wrong_settings_are_refused(folder: Path, harvest: Path) -> None:
    with pytest.raises(InputError, match="d_see"):
        trained(folder / "wrong", values(harvest, sae={"kind": "topk", "d_see": 4}))
    with pytest.raises(InputError, match="differs in: seed"):
        trained(folder / "run", values(harvest, seed=5))
