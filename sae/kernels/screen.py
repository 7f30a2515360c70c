"""Exact encoding by screening: approximate scores, with bounds on their errors, find candidates.

For a row x and a feature w, bounds on what rounding did (Cauchy-Schwarz) give an upper bound of
every pre-activation. Only the features whose bound reaches the k-th largest value found (or the
threshold) are multiplied in float32, and the choice among those is exact: results are those
float32 products, summed in one order, so they depend neither on the screen, nor on chunks or
threads. The bound is the certificate; nothing is left to chance.

| screen | approximate product                                     | used where                |
|--------|---------------------------------------------------------|---------------------------|
| int8   | 8-bit integers, rotated and balanced                    | AVX512-VNNI               |
| int16  | the same with integers of up to 16 bits                 | AVX2                      |
| bf16   | torch's bfloat16 product                                | it is found to be faster  |
| fp32   | torch's float32 product                                 | asked for: the comparison |

SAESCOPE_SCREEN=NAME (auto, none, int8, int16, bf16, fp32) or `using` choose; a screen that is asked
for is used whatever it costs. Shapes: x [batch, d_in]; W [d_sae, d_in]; b, threshold [d_sae].
"""

import ctypes
import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.kernels import cpp_library
from saescope.errors import InputError

SCREENS = ("int8", "int16", "bf16", "fp32")
NAMES = ("auto", "none", *SCREENS)
_BITS = {"int8": 8, "int16": 16}
"""of screens by integers (screen_integers.cpp), of which a processor has one at most"""
_OVERRIDE = "SAESCOPE_SCREEN"
_chosen: list[str] = []
"""innermost last: what `using` asks for"""
_kept: list[str] = []
"""innermost last: what `keeping` asks for"""
_LARGEST_D_IN = 2**16
"""a sum of more products of integers may overflow"""
_SHARE = 1 / 12
"""candidates among the features up to which their float32 products cost less than all of them"""
_DEVIATIONS = 2.5
"""of a sum of rounding errors: what a row's first guess of its k-th largest value leaves for them.
A guess that was too high is found out, and the row done again with all features."""
_LEAST_ROWS, _LEAST_FEATURES, _LEAST_D_IN = 128, 1024, 64
"""below, rounding W costs more than it saves"""
_CHUNK_ELEMENTS = 2**23
"""scores held at a time by the screens that torch multiplies"""


class Found(NamedTuple):
    """What a screen found."""

    row_ptr: Tensor | None
    """int64 [batch + 1], of `above`"""
    index: Tensor  # type: ignore[assignment]
    """int64 [batch, k], or [entries]"""
    value: Tensor
    candidates: int
    """products taken in float32"""


class _Job(ctypes.Structure):
    """`screen::Job` of screen.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x",
                "W",
                "b",
                "threshold",
                "scores",
                "row_bounds",
                "feature_bounds",
                "row_ptr",
                "index",
                "value",
                "entries",
                "upper",
            )
        ),
        *((name, ctypes.c_int64) for name in ("rows", "d", "features", "k", "candidates")),
        *((name, ctypes.c_double) for name in ("limit", "deviations")),
        *((name, ctypes.c_int32) for name in ("by_magnitude", "half", "threads", "status")),
    )


_DONE = 0


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """Within the context, this screen is used; None or auto: chosen.

    Raises InputError for an unknown name.
    """
    _check(name, "screen")
    _chosen.append(name or "auto")
    try:
        yield
    finally:
        _chosen.pop()


@contextmanager
def keeping(name: str) -> Iterator[None]:
    """Within the context, this screen is the `best` of what auto has."""
    _kept.append(name)
    try:
        yield
    finally:
        _kept.pop()


def asked_for() -> str:
    """The screen that SAESCOPE_SCREEN or `using` asks for, or auto; InputError if unknown."""
    return _asked()


def topk(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, *, signed: bool = False
) -> tuple[Tensor, Tensor] | None:
    """The k largest of x W^T + b in each row: (index, value) [batch, k], by rising index.

    Ties go to the lower index. signed: largest in magnitude. None: multiply without a screen.
    """
    found = find(x, W, b, k=k, signed=signed)
    return None if found is None else (found.index, found.value)


def above(
    x: Tensor, W: Tensor, b: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Entries of x W^T + b above threshold [d_sae]: (row_ptr, index, value), by rising index.

    None: multiply without a screen.
    """
    found = find(x, W, b, threshold=threshold)
    if found is None or found.row_ptr is None:
        return None
    return found.row_ptr, found.index, found.value


def find(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    *,
    k: int = 0,
    signed: bool = False,
    threshold: Tensor | None = None,
) -> Found | None:
    """`topk`, or `above` if a threshold is given, and what it took. float32 on the CPU only."""
    if threshold is None and not 1 <= k <= len(W):
        raise InputError("k must be one of", where="k", given=k, allowed=f"1 to {len(W)}")
    asked = _asked()
    name = _choose(x, W, k) if asked == "auto" else asked
    if name == "none" or not usable(name) or not _fit(x, W, b, threshold):
        return None
    call = _Call(x, W, b, k, signed, threshold)
    call.limit = _SHARE * len(W) if asked == "auto" else 0.0
    return call.integers() if name in _BITS else call.scores(half=name == "bf16")


def upper_bounds(x: Tensor, W: Tensor, b: Tensor | None, *, signed: bool = False) -> Tensor | None:
    """The certificate itself: what no pre-activation (or magnitude) exceeds, [batch, d_sae].

    Of the screen that is asked for by name.
    """
    call = _Call(x, W, b, len(W), signed, None)
    call.upper = torch.empty(len(x), len(W))
    name = _asked()
    found = call.integers() if name in _BITS else call.scores(half=name == "bf16")
    return None if found is None else call.upper


def _fit(x: Tensor, W: Tensor, b: Tensor | None, threshold: Tensor | None) -> bool:
    """Whether these can be screened; what is wrong with them is said elsewhere."""
    row = (len(W),)
    return (
        len(x) > 0
        and 0 < x.shape[1] == W.shape[1] <= _LARGEST_D_IN
        and (b is None or b.shape == row)
        and (threshold is None or threshold.shape == row)
    )


def usable(name: str) -> bool:
    """Whether a screen can be used here at all."""
    library = _library()
    if library is None:
        return False
    return name not in _BITS or library.screen_integers_bits() == _BITS[name]


class _Call:
    """One call: what is asked for, and the tensors it needs."""

    def __init__(
        self, x: Tensor, W: Tensor, b: Tensor | None, k: int, signed: bool, bars: Tensor | None
    ) -> None:
        self.x, self.W, self.k, self.signed = _plain(x), _plain(W), k, signed
        self.b, self.bars = b if b is None else _plain(b), bars if bars is None else _plain(bars)
        self.upper: Tensor | None = None
        self.limit = 0.0
        self.threads = torch.get_num_threads()
        self.library: Any = _library()

    def integers(self) -> Found | None:
        """By integers."""
        return self._run("screen_integers", self.x, {"upper": self.upper})

    def scores(self, *, half: bool) -> Found | None:
        """By torch's products, in chunks of rows; half: in bfloat16."""
        rounded = [each.bfloat16() if half else None for each in (self.x, self.W)]
        bounds = [self._bounds(self.x, rounded[0], False), self._bounds(self.W, rounded[1], True)]
        row_bounds, feature_bounds = bounds
        if row_bounds is None or feature_bounds is None:
            return None
        left, right = self.x if rounded[0] is None else rounded[0], rounded[1]
        right = self.W if right is None else right
        blocks, rows = [], max(1, _CHUNK_ELEMENTS // len(self.W))
        for start in range(0, len(self.x), rows):
            block = slice(start, start + rows)
            scores = left[block] @ right.T
            more = {
                "scores": scores,
                "row_bounds": row_bounds[block],
                "feature_bounds": feature_bounds,
                "upper": None if self.upper is None else self.upper[block],
            }
            found = self._run("screen_scores", self.x[block], more, half=half)
            if found is None:
                return None
            blocks.append(found)
            self.limit = 0.0  # the first chunk has shown that it pays
        return _joined(blocks)

    def _bounds(self, rows: Tensor, rounded: Tensor | None, weights: bool) -> Tensor | None:
        out = torch.empty(len(rows), 2)
        fit = self.library.screen_bounds(
            cpp_library.pointer(rows),
            cpp_library.pointer(rounded),
            *rows.shape,
            int(weights),
            cpp_library.pointer(out),
            self.threads,
        )
        return out if fit else None

    def _run(
        self, function: str, x: Tensor, more: dict[str, Tensor | None], *, half: bool = False
    ) -> Found | None:
        job = _Job(
            rows=len(x),
            d=x.shape[1],
            features=len(self.W),
            k=self.k,
            limit=self.limit,
            deviations=_DEVIATIONS,
            by_magnitude=self.signed,
            half=half,
            threads=self.threads,
        )
        size = (len(x), self.k) if self.bars is None else (0,)
        index, value = torch.empty(size, dtype=torch.int64), torch.empty(size)
        row_ptr = None if self.bars is None else torch.empty(len(x) + 1, dtype=torch.int64)
        tensors = {
            "x": x,
            "W": self.W,
            "b": self.b,
            "threshold": self.bars,
            "index": index,
            "value": value,
            "row_ptr": row_ptr,
            **more,
        }
        for name, tensor in tensors.items():
            setattr(job, name, cpp_library.pointer(tensor))
        getattr(self.library, function)(ctypes.byref(job))
        if job.status != _DONE:
            return None
        if row_ptr is not None:
            entries = int(row_ptr[-1])
            index, value = torch.empty(entries, dtype=torch.int64), torch.empty(entries)
            self.library.screen_take(
                ctypes.c_void_p(job.entries), cpp_library.pointer(index), cpp_library.pointer(value)
            )
        return Found(row_ptr, index, value, job.candidates)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def _joined(blocks: list[Found]) -> Found:
    index, value = torch.cat([p.index for p in blocks]), torch.cat([p.value for p in blocks])
    row_ptr, candidates = None, sum(block.candidates for block in blocks)
    if blocks[0].row_ptr is not None:
        counts = torch.cat([p.row_ptr.diff() for p in blocks if p.row_ptr is not None])
        row_ptr = torch.zeros(len(counts) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=row_ptr[1:])
    return Found(row_ptr, index, value, candidates)


def _asked() -> str:
    asked = os.environ.get(_OVERRIDE) or (_chosen[-1] if _chosen else "auto")
    _check(asked, _OVERRIDE)
    return asked


def _check(name: str | None, where: str) -> None:
    if name is not None and name not in NAMES:
        raise InputError("no such screen", where=where, given=name, allowed=", ".join(NAMES))


def _choose(x: Tensor, W: Tensor, k: int) -> str:
    """The screen that is worth a try: one that depends on shapes alone, not on the past."""
    d_sae, d_in = W.shape
    if len(x) < _LEAST_ROWS or d_sae < _LEAST_FEATURES or d_in < _LEAST_D_IN:
        return "none"
    if 2 * k > _SHARE * d_sae:  # at best there are nearly twice as many candidates
        return "none"
    return best(d_in)


def best(d_in: int) -> str:
    """The screen that auto has for enough rows of this width: int8, int16, bf16 or none."""
    if _kept:
        return _kept[-1]
    for name in _BITS:
        if usable(name):
            return name
    if torch.are_deterministic_algorithms_enabled():  # then nothing is measured
        return "none"
    return "bf16" if usable("bf16") and _bf16_pays(d_in, torch.get_num_threads()) else "none"


@functools.cache
def _bf16_pays(d_in: int, threads: int) -> bool:
    """Whether bfloat16 products, with what screening adds, beat float32 here."""
    del threads  # a key
    spent = []
    for dtype in (torch.float32, torch.bfloat16):
        x, W = torch.ones(256, d_in, dtype=dtype), torch.ones(4096, d_in, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            x @ W.T
            times.append(time.perf_counter() - start)
        spent.append(min(times[1:]))
    return spent[1] < 0.6 * spent[0]


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = cpp_library.library()
    if library is None:
        return None
    library.screen_integers_bits.argtypes = []
    for name in ("screen_integers", "screen_scores"):
        getattr(library, name).argtypes = [ctypes.POINTER(_Job)]
        getattr(library, name).restype = None
    library.screen_take.argtypes = [ctypes.c_void_p] * 3
    library.screen_take.restype = None
    library.screen_bounds.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
    ]
    return library
