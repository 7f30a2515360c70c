"""Dense float32 products on the CPU: by torch's default library, or by oneDNN where it is faster.

Which of the two is faster differs by a factor of two either way between processors. It is measured
once, for each number of threads, and written to the user's cache, so that runs on one machine
round alike. Deterministic mode takes the default library and measures nothing.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sae.kernels import cpp_library
from saescope.cache import remembered

_DEFAULT, _ONEDNN = "default", "onednn"
_ROWS, _WIDTH, _FEATURES = 256, 768, 2048
"""what is multiplied to measure"""
_REPEATS = 5
_kept: list[str] = []
"""innermost last: what `using` asks for"""
_BETTER = 0.85
"""oneDNN must take less than this part of the default's time"""


def rows_by_features(x: Tensor, W: Tensor, buffer: Tensor) -> Tensor:
    """x W^T [rows, d_sae] for x [rows, d] and W [d_sae, d]; in `buffer` where that can be."""
    if faster() == _ONEDNN:
        return _by_onednn(x, W)
    return torch.mm(x, W.T, out=buffer[: len(x)])


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within the context, products go to this library, one of `usable`."""
    _kept.append(name)
    try:
        yield
    finally:
        _kept.pop()


def usable() -> list[str]:
    """The libraries there are."""
    return [_DEFAULT, *([_ONEDNN] if _has_onednn() else [])]


def faster() -> str:
    """The library that products go to: default or onednn."""
    if _kept:
        return _kept[-1]
    if torch.are_deterministic_algorithms_enabled() or not _has_onednn():
        return _DEFAULT
    return _remembered(torch.get_num_threads())


def _by_onednn(x: Tensor, W: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, W, None, "none", [], "")


@functools.cache
def _has_onednn() -> bool:
    """Whether torch still has this private operator."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        found = _by_onednn(torch.ones(2, 3), torch.ones(4, 3))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return found.shape == (2, 4) and bool((found == 3).all())


@functools.cache
def _remembered(threads: int) -> str:
    name = f"product-{cpp_library.machine()}-{threads}"
    return remembered(name, (_DEFAULT, _ONEDNN), _measured)


def _measured() -> str:
    x, W = torch.ones(_ROWS, _WIDTH), torch.ones(_FEATURES, _WIDTH)
    buffer = torch.empty(_ROWS, _FEATURES)
    ways: dict[str, Callable[[], Tensor]] = {
        _DEFAULT: lambda: torch.mm(x, W.T, out=buffer),
        _ONEDNN: lambda: _by_onednn(x, W),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS):  # in turn: what else runs on the machine slows both
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            spent[name].append(time.perf_counter() - start)
    return _ONEDNN if min(spent[_ONEDNN]) < _BETTER * min(spent[_DEFAULT]) else _DEFAULT
