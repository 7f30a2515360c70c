"""The order of a run's batches: the default of new runs, and that a run goes on in its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from activations import ActivationStore
from sae.training.command import TrainConfig
from sae.training.setup import Run
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
    path.write_text(json.dumps(manifest))
    for order in (None, "chunks"):
        again = run(store, tmp_path / "run", order=order)
        assert (again.tag, reads_in(again)) == (older.tag, "chunks")
    with pytest.raises(InputError, match="differs in: order"):
        run(store, tmp_path / "run", order="spread")
