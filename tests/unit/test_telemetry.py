"""metrics.jsonl, and the sinks beside it: what they are given, and that a resumed run goes on."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sae.training import telemetry
from sae.training.telemetry import MetricsLog, check_sink, read_metrics, sinks
from saescope.errors import InputError


class FakeWandb(ModuleType):
    """Runs by their id, as the service keeps them; it takes no step below the last."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, dict[int, dict]] = {}
        self.calls: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.calls.append(options)
        history = self.runs.setdefault(options["id"], {})
        service = self

        class Run:
            @property
            def step(self) -> int:
                return max(history, default=-1) + 1

            def log(self, values: dict, *, step: int) -> None:
                assert step >= self.step
                history[step] = values

            def finish(self) -> None:
                service.finished += 1

        return Run()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


class FakeWriter:
    """TensorBoard's writer: events in its folder survive, those from purge_step on are hidden."""

    folders: dict[str, list[tuple[int, str, float]]]
    texts: list[str]

    def __init__(self, log_dir: str, purge_step: int | None) -> None:
        self.events = self.folders.setdefault(log_dir, [])
        if purge_step is not None:
            self.events[:] = [event for event in self.events if event[0] < purge_step]
        self.open = True

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert self.open
        self.events.append((step, name, value))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts.append(text)

    def flush(self) -> None:
        assert self.open

    def close(self) -> None:
        self.open = False


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> type[FakeWriter]:
    FakeWriter.folders, FakeWriter.texts = {}, []
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return FakeWriter


def run(folder: Path, kind: Any, steps: range, resume_step: int = 0, tag: str = "t") -> None:
    folder.mkdir(exist_ok=True)
    log = MetricsLog(
        folder / "metrics.jsonl",
        resume_step=resume_step,
        sinks=sinks(kind, folder, "a run", {"k": 8}, tag=tag, resume_step=resume_step),
    )
    for step in steps:
        values = {"fvu": step / 64, "layers": {"a": {"l0": 2}}, "kind": "topk", "odd": True}
        log.append(step, tokens=10 * step, held_out=values)
    log.close()


EXPECTED = {"tokens": 50.0, "held_out/fvu": 5 / 64, "held_out/layers/a/l0": 2.0}


def test_no_sink(tmp_path: Path) -> None:
    run(tmp_path, "none", range(5, 16, 5))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15]
    assert lines[0]["held_out"]["layers"] == {"a": {"l0": 2}}


def test_wandb(tmp_path: Path, wandb: FakeWandb) -> None:
    run(tmp_path, "wandb", range(5, 16, 5))
    assert wandb.calls[0] | {"id": ""} == {
        "project": "saescope", "name": "a run", "id": "", "resume": "allow",
        "dir": str(tmp_path), "config": {"k": 8},
    }  # fmt: skip
    (history,) = wandb.runs.values()
    assert list(history) == [5, 10, 15]
    assert history[5] == EXPECTED
    assert wandb.finished == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, wandb: FakeWandb) -> None:
    """Killed after step 15 with a checkpoint at 12: step 15 is measured again, and sent once."""
    run(tmp_path, "wandb", range(5, 16, 5))
    run(tmp_path, "wandb", range(15, 26, 5), resume_step=12)
    (history,) = wandb.runs.values()
    assert list(history) == [5, 10, 15, 20, 25]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(history)


def test_other_runs_are_other_wandb_runs(tmp_path: Path, wandb: FakeWandb) -> None:
    run(tmp_path / "a", "wandb", range(1, 2))
    run(tmp_path / "b", "wandb", range(1, 2))
    run(tmp_path / "a", "wandb", range(1, 2), tag="another configuration")
    assert len(wandb.runs) == 3
    assert all(name.isalnum() and len(name) == 16 for name in wandb.runs)


def test_tensorboard(tmp_path: Path, tensorboard: type[FakeWriter]) -> None:
    run(tmp_path, "tensorboard", range(5, 16, 5))
    run(tmp_path, "tensorboard", range(15, 26, 5), resume_step=12)
    (events,) = tensorboard.folders.values()
    assert list(tensorboard.folders) == [str(tmp_path / "tensorboard")]
    assert [event for event in events if event[1] == "tokens"] == [
        (step, "tokens", 10.0 * step) for step in (5, 10, 15, 20, 25)
    ]
    assert {name: value for step, name, value in events if step == 5} == EXPECTED
    assert len(tensorboard.texts) == 1
    assert '"k": 8' in tensorboard.texts[0]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_real_tensorboard(tmp_path: Path) -> None:
    run(tmp_path, "tensorboard", range(5, 16, 5))
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents*"))


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_what_is_not_installed_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    for name in (kind, telemetry._MODULES[kind]):
        monkeypatch.setitem(sys.modules, name, None)
    for ask in (lambda: check_sink(kind), lambda: sinks(kind, tmp_path, "a run", {})):
        with pytest.raises(InputError, match=f"telemetry: the package {kind} is not installed"):
            ask()
    assert not list(tmp_path.iterdir())


def test_unknown_sink(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such telemetry.*none, wandb, tensorboard"):
        sinks("mlflow", tmp_path, "a run", {})  # type: ignore[arg-type]
    check_sink("none")


def test_a_fresh_run_drops_the_old_metrics(tmp_path: Path) -> None:
    run(tmp_path, "none", range(5, 16, 5))
    run(tmp_path, "none", range(5, 6))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [5]
