"""Snapshots: which steps they are at, that a resumed run has the same, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

import sae
from sae.commands.examination import examine
from sae.evaluation.reconstruction import measure_reconstruction
from sae.training import run_folder
from sae.training.rows import _Split
from sae.training.snapshots import find_snapshots, log_spaced_steps
from sae.training.telemetry import read_metrics
from sae.training.trainer import METRICS, Trainer
from sae.training.trainer_config import TrainerConfig
from saescope.config import to_dict
from saescope.errors import InputError
from tests.unit.test_train_rows import SETTINGS, X, same

# 18 steps of 64 rows of the 1,140 that are not held out
SHORT: dict[str, Any] = {**SETTINGS, "passes": 1.05, "k": 3, "checkpoint_every": 5}


@pytest.mark.parametrize("total", [2, 9, 120, 5000, 250_000])
def test_steps_are_spaced_by_equal_ratios(total: int) -> None:
    for count in (0, 1, 2, 7, total // 2, total - max(1, total // 1000)):
        if count > total - max(1, total // 1000):
            continue
        steps = log_spaced_steps(count, total)
        assert len(set(steps)) == count
        assert all(max(1, total // 1000) <= step < total for step in steps)
    far = log_spaced_steps(8, 250_000)
    ratios = [b / a for a, b in zip(far, [*far[1:], 250_000], strict=True)]
    assert far[0] == 250
    assert ratios == pytest.approx([1000 ** (1 / 8)] * 8, rel=0.01)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_training_is_the_same_with_them_and_each_is_an_sae(tmp_path: Path, kind: str) -> None:
    settings = {**SHORT, "evaluate_every": 3}
    plain = sae.train(X, kind, **settings, out=tmp_path / "plain")
    kept = sae.train(X, kind, **settings, snapshots=4, out=tmp_path / "run")
    assert same(plain, kept)
    measured = [read_metrics(tmp_path / name / METRICS) for name in ("plain", "run")]
    assert measured[0] == measured[1]
    found = find_snapshots(tmp_path / "run")
    assert [each.tokens for each in found] == [64 * step for step in (1, 2, 4, 9)]
    assert found[0].path.name == "tokens-000000000064"
    last = sae.load(found[-1].path)
    assert (last.metadata["tokens_trained"], last.metadata["step"]) == (576, 9)
    assert not same(last, kept)
    assert last.normaliser.kind == "none"  # folded, as a release is
    assert examine(tmp_path / "run", "run").faults == []


def test_a_snapshot_of_the_last_step_is_the_released_sae(tmp_path: Path) -> None:
    trained = sae.train(
        X, "batchtopk", **SHORT, optimiser="schedule_free_adam", snapshot_tokens=(100, 18 * 64),
        out=tmp_path / "run",
    )  # fmt: skip
    early, last = find_snapshots(tmp_path / "run")
    assert (early.tokens, last.tokens) == (128, 18 * 64)
    assert same(sae.load(last.path), trained)


def test_what_is_measured_last_is_the_released_sae() -> None:
    """Of a schedule-free optimiser, whose averages are put in place before."""
    trained = sae.train(X, "topk", **SHORT, optimiser="schedule_free_adam")
    held_out = X[_Split(len(X), 0.05, 0).held]
    found = measure_reconstruction(trained, lambda: iter([held_out]))
    assert found.fvu == pytest.approx(trained.metadata["held_out"]["fvu"], rel=1e-5)


def test_a_killed_and_resumed_run_has_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SHORT, "snapshots": 6}
    sae.train(X, "batchtopk", **settings, out=tmp_path / "whole")
    step = Trainer.train_step

    def killed(self: Trainer, raw: Any) -> Any:
        if self.step == 8:  # after the snapshot of step 7, which the checkpoint of 5 knows not
            raise KeyboardInterrupt
        return step(self, raw)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        sae.train(X, "batchtopk", **settings, out=tmp_path / "run")
    assert len(find_snapshots(tmp_path / "run")) == 5
    monkeypatch.setattr(Trainer, "train_step", step)
    sae.train(X, "batchtopk", **settings, out=tmp_path / "run")
    whole, resumed = (find_snapshots(tmp_path / name) for name in ("whole", "run"))
    assert len(whole) == 6
    assert [each.tokens for each in whole] == [each.tokens for each in resumed]
    for one, other in zip(whole, resumed, strict=True):
        for file in ("config.json", "weights.safetensors"):
            assert (one.path / file).read_bytes() == (other.path / file).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshots": -1}, r"trainer\.snapshots: out of range"),
        ({"snapshots": 18}, "more snapshots than steps before the last .given: 18; allowed: up to"),
        ({"snapshot_tokens": (0,)}, r"trainer\.snapshot_tokens: out of range"),
        ({"snapshot_tokens": (128, 64)}, "must ascend"),
        ({"snapshot_tokens": (64, 64)}, "must ascend"),
        ({"snapshot_tokens": (10_000,)}, "more tokens than the run has .*up to 1152"),
        ({"snapshots": 2, "snapshot_tokens": (64,)}, "not both"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sae.train(X, "topk", **SHORT, **settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_folder_there_is_nowhere_to_keep_them() -> None:
    with pytest.raises(InputError, match="needs a folder"):
        sae.train(X, "topk", **SHORT, snapshots=2)


def test_runs_from_before_there_were_any_go_on() -> None:
    before = to_dict(TrainerConfig())
    for name in ("snapshots", "snapshot_tokens"):
        del before[name]
    older, now = ({"trainer": each} for each in (before, to_dict(TrainerConfig())))
    assert run_folder.identity(older) == run_folder.identity(now)
    kept = {"trainer": to_dict(TrainerConfig(snapshots=3))}
    assert run_folder.identity(kept) != run_folder.identity(now)


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    sae.train(X, "topk", **SHORT, snapshots=2, out=tmp_path / "run")
    path = find_snapshots(tmp_path / "run")[0].path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (tmp_path / "run" / "checkpoints" / "mine").mkdir()
    faults = [(fault[0], fault[1]) for fault in examine(tmp_path / "run", "run").faults]
    assert len(faults) == 2
