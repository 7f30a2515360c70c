"""Which operations of the `cpu` backend torch does: by a table of times, measured once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae import kernels
from sae.kernels import (
    adam,
    cpp_backend,
    cpp_library,
    fastest,
    operations,
    reference_backend,
    torch_backend,
)
from sae.kernels.fastest import Shape
from sae.kernels.operations import ALL_OWN, OPERATIONS
from tests.kernels.cases import Random

pytestmark = pytest.mark.skipif(cpp_library.library() is None, reason="no compiler here")
LARGE, SMALL = Shape(64, 512, 1024), Shape(64, 64, 1024)
D_SAE = 300


def table(**seconds: tuple[float, float]) -> dict[str, dict[str, float]]:
    """A table of times (of C++, of torch); where none is given C++ takes half of torch's."""
    return {
        name: dict(zip(("cpu", "torch"), seconds.get(name, (1.0, 2.0)), strict=True))
        for name in OPERATIONS
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("saescope.cache.cache_dir", lambda: tmp_path)
    return tmp_path


def test_each_operation_goes_to_the_faster_of_its_backends() -> None:
    found = fastest.faster(table(decode=(0.021, 0.007), weight_gradient=(0.032, 0.018)))
    theirs = {name for name, backend in found.items() if backend == "torch"}
    assert theirs == {"decode", "weight_gradient"}
    assert found.keys() == set(OPERATIONS)


def test_what_timing_cannot_tell_goes_to_cpp() -> None:
    found = fastest.faster(table(decode=(0.020, 0.019), decode_error=(0.015, 0.018)))
    assert set(found.values()) == {"cpu"}


CODES = Random(0).codes(40, D_SAE, 9)
X, W, B = Random(1).normal(40, 24), Random(2).normal(D_SAE, 24), Random(3).normal(D_SAE)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "topk": (X, W, B, 5),
    "above": (X, W, B, torch.ones(D_SAE)),
    "decode": (*CODES, W),
    "entry_dots": (*CODES[:2], X, W),
    "decode_error": (*CODES, W, X[0], X),
    "weight_gradient": (*CODES, X, D_SAE),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_chosen_backend_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's bits where torch is chosen, and the C++ is not called; the other way round too."""
    called: list[str] = []
    real = cpp_backend._call
    monkeypatch.setattr(
        cpp_backend, "_call", lambda what, *given: (called.append(what), real(what, *given))[1]
    )
    theirs = getattr(torch_backend, name)(*ARGUMENTS[name])
    with operations.using({name: "torch"}):
        found = getattr(cpp_backend, name)(*ARGUMENTS[name])
    assert called == []
    pairs = zip(found, theirs, strict=True) if isinstance(found, tuple) else [(found, theirs)]
    assert all(torch.equal(one, other) for one, other in pairs)
    for choice in ({name: "cpu"}, {}, {"decode" if name == "topk" else "topk": "torch"}):
        called.clear()
        with operations.using(choice):
            getattr(cpp_backend, name)(*ARGUMENTS[name])
        assert called


def test_the_optimiser_is_chosen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(adam, "_square_in_torch", lambda *_: called.append("gradient_square"))
    monkeypatch.setattr(adam, "_adam_in_torch", lambda *_, **__: called.append("adam"))
    for name in ("gradient_square", "adam"):
        for choice in ({}, {name: "torch"}):
            with kernels.using("cpu"), operations.using(choice):
                if name == "adam":
                    adam.adam_(
                        W.clone(), W, W.clone(), W.abs(),
                        lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, step=1, scale=1.0, unit_rows=False,
                    )  # fmt: skip
                else:
                    adam.gradient_square(W, W, unit_rows=False)
    assert called == ["gradient_square", "adam"]


def test_autocast_changes_nothing_where_torch_is_chosen() -> None:
    with operations.using({"topk": "torch"}), torch.autocast("cpu", torch.bfloat16):
        found = cpp_backend.topk(X, W, B, 5)[1]
    assert found.dtype == torch.float32
    assert torch.equal(found, torch_backend.topk(X, W, B, 5)[1])


def test_sums_of_features_have_the_same_bits_in_both() -> None:
    """Which is why they are not among what is chosen."""
    _, index, value = Random(4).codes(900, D_SAE, 40)
    ours, theirs = (each.feature_sums(index, value, D_SAE) for each in (cpp_backend, torch_backend))
    assert torch.equal(ours, theirs)
    exact = reference_backend.feature_sums(index, value.double(), D_SAE)
    assert torch.allclose(ours.double(), exact, atol=1e-4)


def test_decoding_row_by_row_has_torchs_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_backend, "_FEW", 2**40)
    assert torch.equal(cpp_backend.decode(*CODES, W), torch_backend.decode(*CODES, W))


def test_a_machine_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([table(decode=(3.0, 1.0))])
    monkeypatch.setattr(fastest, "measured", lambda shape: next(given))
    first = fastest.backends(LARGE)
    assert first == {**ALL_OWN, "decode": "torch"}
    assert fastest.backends(LARGE) == first  # as another process reads it
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_note_is_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([table(), table(adam=(3.0, 1.0))])
    monkeypatch.setattr(fastest, "measured", lambda shape: next(given))
    fastest.backends(LARGE)
    (path,) = cache.iterdir()
    path.write_text('{"seconds": {"decode": {}}}')
    assert fastest.backends(LARGE)["adam"] == "torch"


def test_other_sizes_and_processors_are_measured_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Shape] = []
    monkeypatch.setattr(fastest, "measured", lambda shape: seen.append(shape) or table())
    for shape in (LARGE, Shape(70, 500, 1100), Shape(64, 512, 4096)):
        fastest.backends(shape)
    assert seen == [LARGE, Shape(64, 512, 4096)]  # the second is of the first one's class
    monkeypatch.setattr(cpp_library, "machine", lambda: "another")
    fastest.backends(LARGE)
    assert seen[-1] == LARGE
    assert len(seen) == 3


def test_small_and_deterministic_runs_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "measured", lambda shape: pytest.fail("measured"))
    assert fastest.backends(SMALL) == ALL_OWN
    torch.use_deterministic_algorithms(True)
    try:
        assert fastest.backends(LARGE) == ALL_OWN
    finally:
        torch.use_deterministic_algorithms(False)


def test_measuring_gives_a_time_of_each_and_changes_nothing_else() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    found = fastest.measured(Shape(8, 32, 64))
    assert found.keys() == set(OPERATIONS)
    assert all(0 < each < 10 for spent in found.values() for each in spent.values())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
