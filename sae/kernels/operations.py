"""Which operations of the `cpu` backend are done by torch's operators instead of its C++.

C++ does all of them, but for those that a run found torch to be faster at on its machine
(`sae.kernels.fastest`). The two sum in different orders, so last bits depend on the choice: a run
records it, and keeps to it when it is resumed. Outside of a run nothing is chosen by timing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

OWN: str = "cpu"
OTHER: str = "torch"
"""the backends that an operation can be of, as manifests name them"""
OPERATIONS: tuple[str, ...] = (
    "topk",
    "above",
    "decode",
    "entry_dots",
    "decode_error",
    "weight_gradient",
    "gradient_square",
    "adam",
)
"""Those of `sae.kernels.backend`, and the two of `sae.kernels.adam`. The sums of features are not
among them: C++ and torch take the same time for the same bits."""
ALL_OWN: dict[str, str] = dict.fromkeys(OPERATIONS, OWN)
_kept: list[Mapping[str, str]] = []
"""innermost last: what `using` asks for"""


@contextmanager
def using(backends: Mapping[str, str]) -> Iterator[None]:
    """Within the context, each operation is done by the backend given for it; C++ if not given."""
    _kept.append(backends)
    try:
        yield
    finally:
        _kept.pop()


def by_torch(operation: str) -> bool:
    """Whether an operation of the `cpu` backend is now done by torch's operators."""
    return bool(_kept) and _kept[-1].get(operation, OWN) == OTHER
