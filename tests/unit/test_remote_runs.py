"""Runs in a bucket of a server that speaks S3, on this machine: read, measured, trained."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae import TrainConfig, distributed, train
from sae.commands.sweep import MEMBERS, SweepConfig, read_members, sweep
from sae.evaluation.metric_table import read_metric_table
from sae.evaluation.written import read_evaluation
from sae.formats.load import load
from sae.kernels import matmul
from sae.training import remote_run, telemetry
from sae.training.trainer import Trainer
from saescope.__main__ import main
from saescope.artefact import MANIFEST
from saescope.config import from_dict
from saescope.errors import ArtefactError, InputError
from saescope.paths import (
    as_path,
    exists,
    file_sizes,
    object_version,
    objects,
    put,
    read_bytes,
    remove,
    upload,
)
from store import FeatureStore
from tests.interrupt import Interrupt, Killed
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
            "harvest": str(root / "data" / "harvest"), "out": str(out), "passes": 0.2,
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
    assert len(read_metric_table(there, read_evaluation(there))) > 10
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


def content(url: str) -> dict[str, bytes]:
    """The objects of a run by name, without what is of the moment it was made."""
    folder = as_path(url)
    found = {name: read_bytes(folder / name) for name in file_sizes(folder)}
    for name in (MANIFEST, "evaluation.json", "evaluation.parquet"):
        found.pop(name, None)
    return found


def test_a_run_in_a_bucket_has_the_files_of_one_here(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "s3://bucket/runs/trained"
    train(config_of(root, url))
    assert content(url) == content(str(root / "run"))
    assert not list((root / "cache").glob("runs/*"))
    assert not exists(as_path("s3://bucket/runs/.trained.lock"))
    before = file_versions(url)
    train(config_of(root, url))
    assert "already trained" in capsys.readouterr().out
    assert file_versions(url) == before


def file_versions(url: str) -> dict[str, Any]:
    folder = as_path(url)
    return {name: object_version(folder / name) for name in file_sizes(folder)}  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["upload", "copy", "remove"])
def test_a_run_that_is_killed_at_any_object_goes_on(
    root: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before the nth object that it writes, copies or removes, for every n."""
    url, kills = f"memory://{what}/killed", 0
    made = content(str(root / "run"))
    left = remote_run.RemoteRun(as_path(url)).folder / "checkpoints" / "last"  # type: ignore[arg-type]
    finished = False
    while not finished:
        with monkeypatch.context() as patch:
            Interrupt(patch, remote_run, what, kills + 1, Killed())
            try:
                train(config_of(root, url))
                finished = True
            except Killed:
                kills += 1
        left.mkdir(parents=True, exist_ok=True)  # as a real kill would leave something
        train(config_of(root, url))
        assert content(url) == made, kills
        remove(as_path(url))
    assert kills >= 6  # two files of each of three checkpoints


def test_a_checkpoint_is_gone_on_from_and_not_begun_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "s3://bucket/runs/resumed"
    with monkeypatch.context() as patch:
        Interrupt(patch, Trainer, "advance", 13, Killed())
        with pytest.raises(Killed):
            train(config_of(root, url))
    with pytest.raises(ArtefactError, match="this run is not finished"):
        load(url)
    capsys.readouterr()
    train(config_of(root, url))
    assert "10 done before" in capsys.readouterr().out
    assert content(url) == content(str(root / "run"))


def test_what_a_run_in_a_bucket_cannot_be_is_one_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"differs in: passes.*choose another out"):
        train(config_of(root, "s3://bucket/runs/copied", passes=0.3))
    put(as_path("s3://bucket/other/file"), b"mine")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^s3://bucket/other: holds no run"):
        train(config_of(root, "s3://bucket/other"))
    config = config_of(root, "s3://bucket/runs/x")
    monkeypatch.setattr(telemetry, "_module", lambda kind: kind)  # as if it were installed
    with_sink = dataclasses.replace(config.trainer, telemetry="tensorboard")
    with pytest.raises(InputError, match=r"trainer.telemetry: writes files into the run's folder"):
        train(dataclasses.replace(config, trainer=with_sink))
    for harvest in ("s3://bucket/runs/x/harvest", "s3://bucket/runs/x", "s3://bucket/runs"):
        with pytest.raises(InputError, match="may not lie in what is read"):
            remote_run.remote_run(as_path(config.out), as_path(harvest), config.trainer)
    apart = as_path("s3://bucket/runs/x-harvest")
    assert remote_run.remote_run(as_path(config.out), apart, config.trainer) is not None
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="training one run into an object store runs in one"):
        remote_run.remote_run(as_path(config.out), apart, config.trainer)
    assert not objects(as_path("s3://bucket/runs/x"))  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", ["", "/sae"])
def test_doctor_says_that_a_run_is_to_be_copied(
    root: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"s3://bucket/runs/copied{folder}"]) == 2
    assert "which is checked in a folder of this machine; copy it there" in capsys.readouterr().err


def test_a_plan_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_of(root, "s3://bucket/runs/planned", plan=True))
    assert "s3://bucket/runs/planned: topk" in capsys.readouterr().out
    assert not objects(as_path("s3://bucket/runs/planned"))  # type: ignore[arg-type]


def sweep_of(root: Path, out: str | Path) -> SweepConfig:
    return SweepConfig(
        harvest=str(root / "data" / "harvest"),
        out=str(out),
        base={"passes": 0.2, "sae": {"d_sae": 32}, "trainer": {"batch_size": 64}},
        grid=({"sae.kind": "topk", "sae.k": [3, 5]}, {"sae.kind": "relu"}),
    )


@pytest.mark.slow
def test_a_sweep_goes_on_and_is_measured_in_a_bucket(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "s3://bucket/sweep"
    with monkeypatch.context() as patch:
        Interrupt(patch, remote_run, "upload", 12, Killed())
        with pytest.raises(Killed):
            sweep(sweep_of(root, url))
    runs = sweep(sweep_of(root, url))
    assert list(map(str, runs)) == [f"{url}/{name}" for name in read_members(as_path(url))]
    for remote, local in zip(runs, sweep(sweep_of(root, root / "sweep")), strict=True):
        assert content(str(remote)) == content(str(local))
    assert main(["eval", url, "--tokens", "0"]) == 0
    assert capsys.readouterr().out.count(": measured in") == 3
    assert all(exists(run / "evaluation.json") for run in runs)
    assert not list((root / "cache").glob("runs/*"))


def test_ranks_of_srun_are_refused_in_a_bucket(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="several processes work in an object store only if torch"):
        sweep(sweep_of(root, "s3://bucket/refused"))
    assert not objects(as_path("s3://bucket/refused"))  # type: ignore[arg-type]


WORKER = """
import os, sys
from pathlib import Path
from sae.commands import sweep
from sae.kernels import matmul
from tests.unit.test_remote_runs import sweep_of

real = sweep._train_together
def told(runs, beginning):
    for run in runs:
        os.write(1, f"rank {os.environ['RANK']} trains {run.folder.name}\\n".encode())
    real(runs, beginning)
sweep._train_together = told
with matmul.using("default"):  # each process would time which library is faster
    sweep.sweep(sweep_of(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.slow
def test_processes_that_share_a_bucket_alone_train_each_run_once(
    root: Path, tmp_path: Path
) -> None:
    script, url = tmp_path / "worker.py", "s3://bucket/shared-sweep"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    top = str(Path(__file__).parents[2])
    found = subprocess.run(
        [*command, "2", str(script), str(root), url],
        text=True, capture_output=True, timeout=280, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": top},
    )  # fmt: skip
    assert not found.returncode, found.stderr
    trained = [line.split()[3] for line in found.stdout.splitlines() if " trains " in line]
    assert sorted(trained) == sorted(read_members(as_path(url)))
    with matmul.using("default"):
        alone = sweep(sweep_of(root, root / "alone"))
    for local in alone:
        assert content(f"{url}/{local.name}") == content(str(local))
    names = {name.split("/")[0] for name in file_sizes(as_path(url))}
    assert names == {*trained, MEMBERS}  # no lock is left
