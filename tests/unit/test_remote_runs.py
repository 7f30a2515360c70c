"""Runs in a bucket of a server that speaks S3, on this machine: read, measured, trained."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae import TrainConfig, train
from sae.formats.load import load
from saescope.__main__ import main
from saescope.config import from_dict
from saescope.errors import ArtefactError
from saescope.paths import as_path, file_sizes, put, read_bytes, remove, upload
from store import FeatureStore
from tests.s3_server import s3_bucket
from tests.tiny import make_tiny_harvest, make_tiny_model

pytest.importorskip("s3fs", reason="needs s3fs, of the extra s3")
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A harvest, a run on it, and a server with a bucket that has a copy of the run."""
    folder = tmp_path_factory.mktemp("remote-runs")
    make_tiny_harvest(folder / "data", make_tiny_model(folder / "model"), sites=(SITE,))
    with s3_bucket(folder / "cache"):
        train(config_of(folder, folder / "run"))
        copy_up(folder / "run", "s3://bucket/runs/copied")
        yield folder


def config_of(root: Path, out: str | Path, **more: Any) -> TrainConfig:
    trainer = {
        "batch_size": 64, "checkpoint_every": 5, "evaluate_every": 4, "dead_after_tokens": 200,
        "snapshots": 2,
    }  # fmt: skip
    return from_dict(
        TrainConfig,
        {
            "harvest": str(root / "data" / "harvest"), "out": str(out), "passes": 1.0,
            "sae": {"kind": "topk", "d_sae": 32, "k": 3}, "trainer": trainer, **more,
        },
        "test",
    )  # fmt: skip


def copy_up(folder: Path, url: str) -> None:
    for name in file_sizes(folder):
        upload(folder / name, as_path(f"{url}/{name}"))  # type: ignore[arg-type]


def same(one: str | Path, other: str | Path) -> bool:
    a, b = load(one).state_dict(), load(other).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_sae_is_loaded_from_a_bucket(root: Path) -> None:
    assert same("s3://bucket/runs/copied", root / "run")
    assert same("s3://bucket/runs/copied/sae", root / "run")


def test_what_is_wrong_there_is_said_of_the_objects(root: Path) -> None:
    with pytest.raises(ArtefactError, match=r"^s3://bucket/runs/absent: no SAE here"):
        load("s3://bucket/runs/absent")
    url = "s3://bucket/runs/damaged"
    put(as_path(f"{url}/manifest.json"), (root / "run" / "manifest.json").read_bytes())  # type: ignore[arg-type]
    with pytest.raises(ArtefactError, match=rf"^{url}: this run is not finished"):
        load(url)
    copy_up(root / "run", url)
    weights = as_path(f"{url}/sae/weights.safetensors")
    put(weights, read_bytes(weights)[:-1])  # type: ignore[arg-type]
    with pytest.raises(ArtefactError, match=rf"^{url}/sae/weights.safetensors: .*bytes of"):
        load(url)


def test_eval_writes_beside_the_run_what_it_writes_here(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "s3://bucket/runs/copied"
    sae.evaluate(sae.EvaluateConfig(run=str(root / "run"), tokens=0))
    assert main(["eval", url, "--tokens", "0"]) == 0
    there = as_path(f"{url}/evaluation.json")
    assert read_bytes(there) == (root / "run" / "evaluation.json").read_bytes()
    assert main(["eval", url, "--tokens", "0"]) == 0  # it is the same, and left
    assert main(["eval", url, "--tokens", "0", "--rows", "40"]) == 2
    assert "holds an evaluation already; --replace" in capsys.readouterr().err
    assert main(["eval", url, "--tokens", "0", "--rows", "40", "--replace"]) == 0
    assert json.loads(read_bytes(there))["protocol"]["rows"] == 40
    put(there, b'{"mine": 1}')  # type: ignore[arg-type]
    assert main(["eval", url, "--tokens", "0", "--replace"]) == 2
    assert "holds something else than an evaluation of ours" in capsys.readouterr().err
    assert read_bytes(there) == b'{"mine": 1}'
    remove(there)


def test_several_runs_are_measured_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "s3://bucket/runs/copied", str(root / "run"), "--tokens", "0"]
    assert main(words) == 0
    assert main(words) == 0
    assert capsys.readouterr().out.count("is measured already") >= 2
    remove(as_path("s3://bucket/runs/copied/evaluation.json"))


def test_index_and_compare_read_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "s3://bucket/runs/copied"
    made = [tmp_path / "remote", tmp_path / "here"]
    for run, out in zip((url, str(root / "run")), made, strict=True):
        words = ["index", run, "--out", str(out), "--logits", "1", "--neighbours", "1"]
        assert main(words) == 0
    with FeatureStore.open(made[0]) as one, FeatureStore.open(made[1]) as other:
        assert one.meta["sae_path"] == url
        assert one.meta["sae_hash"] == other.meta["sae_hash"]
    assert main(["compare", url, str(root / "run")]) == 0
    assert "32 pairs matched one to one" in capsys.readouterr().out
    assert main(["compare", url]) == 0  # through its snapshots
