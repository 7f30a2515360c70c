"""Which of its backends is the faster at each operation on this machine: measured once.

C++ was the faster at all of them, or as fast, on the processors that were measured (with AVX2 and
with AVX-512; benchmarks/results/bench.csv). Others are not known, so a run whose operations take
some time measures them, in about a second, at sizes near its own; the times are kept in the user's
cache. Deterministic mode and small runs measure nothing: C++ does everything.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from sae.kernels import adam, cpp_backend, cpp_library, gradient_buffers, matmul, operations, screen
from sae.kernels.operations import ALL_OWN, OPERATIONS, OTHER, OWN
from saescope.cache import note, note_file

Times = dict[str, dict[str, float]]
"""seconds by operation and backend"""
_BETTER = 0.85
"""torch must take less than this part of C++'s time: below that timing tells nothing"""
_SMALL = 2**18
"""elements of a weight matrix below which an operation takes next to no time"""
_MOST_ROWS, _MOST_WIDTH, _MOST_FEATURES = 1024, 512, 8192
_ENCODED_ROWS = 256
"""that are multiplied with all features, which takes longest"""
_ACTIVE = 32
"""entries of a row"""
_LEAST_ROUNDS, _MOST_ROUNDS = 4, 16
_SECONDS = 0.1
"""spent on an operation, if so many rounds allow it"""


class Shape(NamedTuple):
    """Sizes of a training step."""

    rows: int
    """at a time"""
    d_in: int
    d_sae: int

    def near(self) -> Self:
        """The sizes at which operations are measured for these: powers of two, not too large.

        >>> Shape(4096, 576, 49152).near()
        Shape(rows=1024, d_in=512, d_sae=8192)
        """
        most = (_MOST_ROWS, _MOST_WIDTH, _MOST_FEATURES)
        near = (2 ** round(math.log2(max(1, size))) for size in self)
        return type(self)(*map(min, near, most))


def backends(shape: Shape) -> dict[str, str]:
    """For each operation the backend that is the faster here, at such sizes."""
    if shape.d_in * shape.d_sae < _SMALL or torch.are_deterministic_algorithms_enabled():
        return dict(ALL_OWN)
    near = shape.near()
    path = note_file(f"operations-{_key(near)}.json")
    known = None if path is None else _read(path)
    if known is None:
        known = measured(near)
        note(path, json.dumps({"shape": near._asdict(), "seconds": known}, indent=1) + "\n")
    return faster(known)


def faster(times: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The backend of each operation by a table of times.

    >>> faster({"decode": {"cpu": 0.021, "torch": 0.007}, "adam": {"cpu": 0.02, "torch": 0.04}})
    {'decode': 'torch', 'adam': 'cpu'}
    """
    return {
        name: OTHER if spent[OTHER] < _BETTER * spent[OWN] else OWN for name, spent in times.items()
    }


@torch.no_grad()
def measured(shape: Shape) -> Times:
    """Seconds of each operation by each backend: the least of some, by one thread, in turn.

    Of the thread's processor time, which other work on the machine does not add to.
    """
    calls, threads = _calls(shape), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _least(name, call) for name, call in calls.items()}
    finally:
        torch.set_num_threads(threads)
        gradient_buffers.give(())


def _least(name: str, call: Callable[[], object]) -> dict[str, float]:
    def seconds(backend: str) -> float:
        with operations.using({name: backend}):
            start = time.thread_time()
            call()
            return time.thread_time() - start

    first = [seconds(backend) for backend in (OWN, OTHER)]
    rounds = min(max(round(_SECONDS / max(sum(first), 1e-9)), _LEAST_ROUNDS), _MOST_ROUNDS)
    least = dict.fromkeys((OWN, OTHER), math.inf)
    for number in range(rounds):
        # whoever comes second finds the tensors in the cache
        for backend in (OWN, OTHER) if number % 2 else (OTHER, OWN):
            least[backend] = min(least[backend], seconds(backend))
    return least


def _calls(shape: Shape) -> dict[str, Callable[[], object]]:
    """Each operation on random rows and weights, and on codes that use all features alike."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rows, d_in, d_sae = shape
    k = min(_ACTIVE, d_sae)
    x, W = normal(rows, d_in), normal(d_sae, d_in) / d_in**0.5
    b_enc, b_dec = torch.zeros(d_sae), torch.zeros(d_in)
    m, v, grad, value = torch.zeros_like(W), torch.zeros_like(W), 1e-3 * W, normal(rows * k)
    first = torch.randint(d_sae, (rows, 1), generator=generator)
    index = ((first + torch.arange(k) * (d_sae // k)) % d_sae).reshape(-1)
    row_ptr, few = torch.arange(rows + 1) * k, x[:_ENCODED_ROWS]
    # pre-activations are normally distributed, and k of a row pass this
    bar = torch.special.ndtri(torch.tensor(1 - (k - 0.5) / d_sae)).expand(d_sae).contiguous()

    def weight_gradient() -> None:
        # as in a training step, which gives its buffers back
        found = cpp_backend.weight_gradient(row_ptr, index, value, x, d_sae)
        gradient_buffers.give([found])

    return {
        "topk": lambda: cpp_backend.topk(few, W, b_enc, k),
        "above": lambda: cpp_backend.above(few, W, b_enc, bar),
        "decode": lambda: cpp_backend.decode(row_ptr, index, value, W),
        "entry_dots": lambda: cpp_backend.entry_dots(row_ptr, index, x, W),
        "decode_error": lambda: cpp_backend.decode_error(row_ptr, index, value, W, b_dec, x),
        "weight_gradient": weight_gradient,
        "gradient_square": lambda: adam.gradient_square(W, grad, True),
        "adam": lambda: adam.adam_(
            W,
            grad,
            m,
            v,
            lr=0.0,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            step=1,
            scale=1.0,
            unit_rows=True,
        ),
    }


def _key(shape: Shape) -> str:
    """Sixteen letters for this machine, library, torch, products and sizes."""
    library = cpp_library.library()
    assert library is not None, "the cpu backend was chosen without its library"
    facts = (
        cpp_library.machine(),
        Path(library._name).name,
        torch.backends.cpu.get_cpu_capability(),
        matmul.faster(),
        screen.best(shape.d_in),
        screen.asked_for(),
        *shape,
    )
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:16]


def _read(path: Path) -> Times | None:
    """The times that a file has of all operations; None if there is no such file."""
    try:
        found = json.loads(path.read_bytes())["seconds"]
        return {n: {each: float(found[n][each]) for each in (OWN, OTHER)} for n in OPERATIONS}
    except (OSError, ValueError, KeyError, TypeError):
        return None
