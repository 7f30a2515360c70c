"""The order of a run's batches: the default of new runs, and that a run goes on in its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from activations import ActivationStore
from sae.training.config import TrainConfig
from sae.training.run import Run
from sae.training.schedules import base_lr, default_lr
from saescope.artefact import SEAL
from saescope.config import from_dict
from saescope.errors import InputError
from tests.tiny import make_tiny_harvest, make_tiny_model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    root = tmp_path_factory.mktemp("order")
    return ActivationStore.open(make_tiny_harvest(root, make_tiny_model(root / "model")))


def run(store: ActivationStore, out: Path, **more: Any) -> Run:
    values: dict[str, Any] = {
        "harvest": str(store.path), "out": str(out), "site": store.sites[0], "passes": 1.0,
        "evaluation_rows": 100, "calibration_rows": 100,
        "sae": {"kind": "topk", "d_sae": 48, "k": 6}, "trainer": {"batch_size": 64},
    }  # fmt: skip
    return Run(from_dict(TrainConfig, values | more, "test"), store)


def reads_in(run: Run) -> str:
    return run.stream.state_dict()["loader"]["order"]


def test_a_new_run_is_in_the_spread_order_and_goes_on_in_it(
    store: ActivationStore, tmp_path: Path
) -> None:
    new = run(store, tmp_path / "run")
    assert (new.settings["order"], reads_in(new)) == ("spread", "spread")
    new.start()
    again = run(store, tmp_path / "run")
    assert (again.tag, reads_in(again)) == (new.tag, "spread")
    with pytest.raises(InputError, match="differs in: order"):
        run(store, tmp_path / "run", order="chunks")


def test_a_run_that_was_asked_for_chunks_goes_on_in_chunks(
    store: ActivationStore, tmp_path: Path
) -> None:
    run(store, tmp_path / "run", order="chunks").start()
    assert reads_in(run(store, tmp_path / "run")) == "chunks"


def test_a_run_from_before_the_setting_goes_on_in_chunks(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_order", lambda *_: None)  # what such a run had
        older = run(store, tmp_path / "run")
        older.start()
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["config"].pop("order") is None
    manifest["schema"] = 1
    del manifest[SEAL]  # runs of that time have none
    path.write_text(json.dumps(manifest))
    for order in (None, "chunks"):
        again = run(store, tmp_path / "run", order=order)
        assert (again.tag, reads_in(again)) == (older.tag, "chunks")
    with pytest.raises(InputError, match="differs in: order"):
        run(store, tmp_path / "run", order="spread")


def dead_after(run: Run) -> int:
    return run.settings["trainer"]["dead_after_tokens"]


def test_dead_after_tokens_is_a_part_of_a_short_run_and_a_begun_run_keeps_its_own(
    store: ActivationStore, tmp_path: Path
) -> None:
    rows = store.n_rows("train")
    new = run(store, tmp_path / "run", passes=2.0)
    assert dead_after(new) == new.trainer.dead_after == round(2 * rows / 32)
    new.start()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["config"]["trainer"]["dead_after_tokens"] == round(2 * rows / 32)
    # the default of runs from before it followed the length
    older = run(
        store, tmp_path / "older", trainer={"batch_size": 64, "dead_after_tokens": 10_000_000}
    )
    older.start()
    again = run(store, tmp_path / "older")
    assert (again.tag, dead_after(again)) == (older.tag, 10_000_000)
    with pytest.raises(InputError, match="differs in: trainer"):
        run(store, tmp_path / "older", trainer={"batch_size": 64, "dead_after_tokens": 5})


def test_a_run_says_its_learning_rate_and_what_from_and_a_begun_run_keeps_its_own(
    store: ActivationStore, tmp_path: Path
) -> None:
    new = run(store, tmp_path / "run", passes=2.0)
    peak = default_lr(new.sae_config.d_sae, new.total_steps)
    assert new.trainer.lr == new.settings["trainer"]["lr"] == peak > base_lr(new.sae_config.d_sae)
    new.start()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["learning_rate"] == {"peak": peak, "from": "the steps"}
    assert manifest["config"]["trainer"]["lr"] == peak
    # the default of runs from before it followed the length
    trainer = {"batch_size": 64, "lr_multiplier": 1.0}
    older = run(store, tmp_path / "older", trainer=trainer)
    older.start()
    again = run(store, tmp_path / "older")
    assert again.tag == older.tag
    assert again.trainer.lr == older.trainer.lr == base_lr(older.sae_config.d_sae)
    with pytest.raises(InputError, match="differs in: trainer"):
        run(store, tmp_path / "older", trainer={"batch_size": 64, "lr": 5e-3})


def test_a_run_in_which_no_feature_can_be_dead_says_so(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(store, tmp_path / "short").start()
    assert "dead_after_tokens" not in capsys.readouterr().out
    run(store, tmp_path / "long", trainer={"batch_size": 64, "dead_after_tokens": 10**6}).start()
    assert "no feature will count as dead" in capsys.readouterr().out


def test_a_harvest_without_held_out_rows_is_refused_before_anything_is_made(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = store.n_rows
    monkeypatch.setattr(store, "n_rows", lambda split: rows(split) if split == "train" else 0)
    with pytest.raises(InputError, match="no held-out rows, on which a run is measured"):
        run(store, tmp_path / "run")
    assert not list(tmp_path.iterdir())
