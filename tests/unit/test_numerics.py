"""A run keeps to the kernels it began with, or says that it cannot; threads change no bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae import distributed, kernels
from sae.architectures import architecture, list_architectures
from sae.kernels import cpp_backend, cpp_library, fastest, matmul, screen
from sae.kernels.operations import ALL_OWN
from sae.training.numerics import Numerics
from sae.training.telemetry import read_metrics
from sae.training.trainer import METRICS, Trainer, TrainerConfig
from saescope.errors import InputError
from tests.unit.test_trainer import Stream, bits, make_trainer

LIKE = torch.zeros(1)
needs_compiler = pytest.mark.skipif(cpp_library.library() is None, reason="no compiler here")


def fills() -> bool:
    """Whether torch fills memory that it has not written yet."""
    return getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAESCOPE_KERNELS", "SAESCOPE_SCREEN"):
        monkeypatch.delenv(name, raising=False)


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(cpp_library, "library", lambda: None)
    monkeypatch.setattr(screen, "_library", lambda: None)


def numerics(asked: Any = "auto", *, deterministic: bool = False) -> Numerics:
    return Numerics(asked, deterministic=deterministic, like=LIKE, shape=fastest.Shape(8, 64, 64))


@needs_compiler
def test_auto_is_the_fastest_and_is_recorded() -> None:
    found = numerics()
    assert found.state_dict() == {
        "kernels": "cpu", "product": matmul.faster(), "screen": screen.best(64),
        "operations": ALL_OWN, "deterministic": False, "threads": torch.get_num_threads(),
    }  # fmt: skip
    assert numerics("torch").state_dict().keys() == {"kernels", "deterministic", "threads"}


def test_within_a_run_its_backend_computes() -> None:
    with numerics("reference").running():
        assert kernels.backend() == "reference"
        with numerics("torch").running():
            assert kernels.backend() == "torch"


def test_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_KERNELS", "reference")
    found = numerics("torch")
    assert found.kernels == "reference"
    with found.running():
        assert kernels.backend() == "reference"


def test_kernels_that_cannot_be_used_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch)
    message = r"trainer.kernels: these kernels cannot be used here \(given: 'cpu'; allowed: auto, "
    with pytest.raises(InputError, match=message):
        numerics("cpu")
    assert numerics().kernels == "torch"
    with pytest.raises(InputError, match="no such kernels"):
        numerics("cuda")


def test_a_run_goes_on_with_what_it_began_with() -> None:
    """Even where something faster has come to be there."""
    found = numerics()
    found.load_state_dict(numerics("torch").state_dict(), where="run")
    assert found.kernels == "torch"
    assert found.kept == {}
    with found.running():
        assert kernels.backend() == "torch"


@needs_compiler
def test_choices_within_the_backend_are_kept() -> None:
    found = numerics()
    other = "none" if found.kept["screen"] != "none" else "bf16"
    found.load_state_dict(
        {**found.state_dict(), "screen": other, "product": "default"}, where="run"
    )
    assert found.kept == {"screen": other, "product": "default"}
    outside = screen.best(64), matmul.faster()
    with found.running():
        assert screen.best(64) == other
        assert matmul.faster() == "default"
    assert (screen.best(64), matmul.faster()) == outside


def test_what_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"kernels": "cpu", "product": "default", "screen": "none", "threads": 1}
    without_library(monkeypatch)
    message = (
        r"run: was trained with kernels 'cpu', which this machine does not have.*to go on with "
        r"other kernels, name them by trainer.kernels or SAESCOPE_KERNELS \(allowed: .*torch\)"
    )
    with pytest.raises(InputError, match=message):
        numerics().load_state_dict(state, where="run")


@needs_compiler
@pytest.mark.parametrize("name", ["product", "screen"])
def test_a_choice_within_the_backend_that_is_gone_is_refused(name: str) -> None:
    state = {**numerics("cpu").state_dict(), name: "amx"}
    with pytest.raises(InputError, match=f"was trained with {name} 'amx'"):
        numerics().load_state_dict(state, where="run")


def test_others_may_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"kernels": "cpu", "product": "default", "screen": "none", "threads": 1}
    monkeypatch.setenv("SAESCOPE_KERNELS", "torch")
    found = numerics()
    found.load_state_dict(state, where="run")
    assert found.kernels == "torch"
    assert "run: goes on with the kernels torch after cpu" in capsys.readouterr().out


def test_another_number_of_threads_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    state = {**numerics("torch").state_dict(), "threads": 99}
    numerics("torch").load_state_dict(state, where="run")
    assert "threads after 99" in capsys.readouterr().out
    numerics("torch", deterministic=True).load_state_dict(state, where="run")
    assert capsys.readouterr().out == ""


def test_deterministic_is_asked_of_torch_and_taken_back() -> None:
    found = numerics("torch", deterministic=True)
    with found.running():
        assert torch.are_deterministic_algorithms_enabled()
        assert not fills()
    assert not torch.are_deterministic_algorithms_enabled()
    assert fills()


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_a_run_uses_and_records_its_kernels(tmp_path: Path, name: str) -> None:
    """Stopped after 7 steps and gone on with under auto, it is as if it had not been stopped."""
    whole = bits(make_trainer(tmp_path / "whole", kernels=name).run())
    stopped, batches = make_trainer(tmp_path / "run", kernels=name), iter(Stream())
    for _ in range(7):
        stopped.advance(next(batches))
    resumed = make_trainer(tmp_path / "run")
    assert (resumed.step, resumed.numerics.kernels) == (7, name)
    resumed.batches.load_state_dict({"step": 7})
    found = bits(resumed.run())
    assert all(torch.equal(whole[key], found[key]) for key in whole)
    assert {line["kernels"] for line in read_metrics(tmp_path / "run" / METRICS)} == {name}


MIXED = {**ALL_OWN, "topk": "torch", "decode_error": "torch", "weight_gradient": "torch"}


@needs_compiler
def test_operations_that_torch_does_faster_are_its_own_unless_cpp_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fastest, "backends", lambda shape: dict(MIXED))
    found = numerics()
    assert found.state_dict()["operations"] == MIXED
    codes = torch.tensor([0, 2]), torch.tensor([1, 0]), torch.ones(2)
    W = torch.randn(3, 4)
    with found.running():
        monkeypatch.setattr(cpp_backend, "_call", lambda *_: pytest.fail("C++"))
        cpp_backend.weight_gradient(*codes, W[:1], 3)
        cpp_backend.topk(W, W, None, 1)
    assert numerics("cpu").state_dict()["operations"] == ALL_OWN


@needs_compiler
def test_a_run_goes_on_with_its_operations_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and gone on with on a machine with other times, it has the bits of one run."""
    monkeypatch.setattr(fastest, "backends", lambda shape: dict(MIXED))
    whole = bits(make_trainer(tmp_path / "whole").run())
    stopped, batches = make_trainer(tmp_path / "run"), iter(Stream())
    for _ in range(7):
        stopped.advance(next(batches))
    monkeypatch.setattr(fastest, "backends", lambda shape: dict(ALL_OWN))
    assert make_trainer(tmp_path / "new").numerics.operations == ALL_OWN
    resumed = make_trainer(tmp_path / "run")
    assert (resumed.step, resumed.numerics.operations) == (7, MIXED)
    resumed.batches.load_state_dict({"step": 7})
    sae = resumed.run()
    assert all(torch.equal(whole[key], found) for key, found in bits(sae).items())
    assert resumed.release().metadata["numerics"]["operations"] == MIXED


@needs_compiler
def test_older_checkpoints_had_one_backend_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "backends", lambda shape: dict(MIXED))
    found = numerics()
    state = found.state_dict()
    del state["operations"]
    found.load_state_dict(state, where="run")
    assert found.operations == ALL_OWN


@needs_compiler
@pytest.mark.parametrize("change", [{"decode": "amx"}, {"fold": "cpu"}])
def test_an_operation_that_is_gone_is_refused(change: dict[str, str]) -> None:
    state = {**numerics().state_dict(), "operations": {**ALL_OWN, **change}}
    with pytest.raises(InputError, match=r"run: was trained with the operation (decode|fold)"):
        numerics().load_state_dict(state, where="run")


@needs_compiler
def test_cpp_alone_may_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {**numerics().state_dict(), "operations": MIXED}
    monkeypatch.setenv("SAESCOPE_KERNELS", "cpu")
    found = numerics()
    found.load_state_dict(state, where="run")
    assert found.operations == ALL_OWN
    said = capsys.readouterr().out
    assert "run: goes on with the kernels cpu alone, where topk, decode_error, weight_gr" in said


@needs_compiler
def test_the_first_of_several_processes_chooses_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second measures nothing, and computes as the first does, or says that it cannot."""
    monkeypatch.setattr(fastest, "backends", lambda shape: pytest.fail("measured"))
    monkeypatch.setattr(distributed.ALL, "rank", 1)
    kept = {"product": "default", "screen": "none"}

    def first(value: Any) -> list[Any]:
        return [("cpu", kept, MIXED), value]

    monkeypatch.setattr(distributed, "everyones", first)
    found = numerics()
    assert (found.kept, found.operations) == (kept, MIXED)
    kept["screen"] = "amx"
    with pytest.raises(InputError, match="rank 1: the first process computes with a screen that"):
        numerics()


ROWS, D_IN, D_SAE = 400, 96, 384
"""enough elements (over 32768) for torch to split sums over all of them among threads"""


def trained(kind: str, name: str, threads: int, folder: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(ROWS, D_IN, generator=generator) for _ in range(5)]
    torch.manual_seed(0)
    names = architecture(kind).Config.__dataclass_fields__
    config = architecture(kind).Config(d_sae=D_SAE, **({"k": 12} if "k" in names else {}))
    sae = architecture(kind)(config, D_IN)
    trainer = Trainer(
        sae,
        Stream(),
        TrainerConfig(
            batch_size=ROWS, dead_after_tokens=2 * ROWS, evaluate_every=5, checkpoint_every=5,
            kernels=name, deterministic=True,  # type: ignore[arg-type]
        ),
        total_steps=5,
        held_out=lambda: iter(batches[:1]),
        folder=folder,
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in batches:
            trainer.advance(batch)
    finally:
        torch.set_num_threads(before)
    return bits(trainer.sae)


@needs_compiler
@pytest.mark.parametrize(
    "kind",
    sorted(k for k, cls in list_architectures().items() if not cls.Config().needs_neighbours),
)
def test_threads_change_no_bit_of_a_deterministic_run(tmp_path: Path, kind: str) -> None:
    one = trained(kind, "cpu", 1, tmp_path / "1")
    for threads in (2, 3):
        found = trained(kind, "cpu", threads, tmp_path / str(threads))
        assert [name for name in one if not torch.equal(one[name], found[name])] == []


def test_threads_change_no_bit_without_a_compiler(tmp_path: Path) -> None:
    one = trained("topk", "torch", 1, tmp_path / "1")
    found = trained("topk", "torch", 2, tmp_path / "2")
    assert [name for name in one if not torch.equal(one[name], found[name])] == []
