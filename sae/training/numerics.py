"""The numerical choices of a run: kernels, matrix product, determinism.

They decide its bits besides its configuration and its data.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from sae import distributed, kernels
from sae.kernels import fastest, matmul, operations, screen
from saescope.errors import InputError
from saescope.progress import say

KernelsKind = Literal["auto", "reference", "torch", "cpu", "triton"]
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class Numerics:
    """The kernels of one run: chosen once, and kept when the run is resumed.

    With the `cpu` backend, further choices are made by timing: which library multiplies matrices,
    which screen finds the candidates of a top-k before it, and, unless the backend was asked for
    by its name, which operations torch does faster. Of several processes the first chooses for all.

    Args:
        asked: a backend, or auto; SAESCOPE_KERNELS comes before it.
        deterministic: sums have an order that neither chance nor the number of threads decides.
        like: a tensor of the type and on the device of what is computed.
        shape: sizes of a step, in each process.

    Raises InputError if the backend that is asked for cannot be used here.
    """

    def __init__(
        self, asked: KernelsKind, *, deterministic: bool, like: Tensor, shape: fastest.Shape
    ) -> None:
        with kernels.using(asked):
            self._asked, self.kernels = kernels.asked_for(), kernels.backend(like)
        self._usable, self._d_in = kernels.available(like), shape.d_in
        self.deterministic = deterministic
        self.kept: dict[str, str] = {}
        """choices within the backend, by what is chosen"""
        self.operations: dict[str, str] = {}
        """the backend of each operation, where the backend leaves some to another"""
        if self._asked not in ("auto", self.kernels):
            raise InputError(
                "these kernels cannot be used here",
                where="trainer.kernels",
                given=self._asked,
                allowed=("auto", *self._usable),
            )
        self._choose()
        with _deterministic(deterministic):
            if self.kernels == "cpu" and distributed.rank() == 0:
                auto = self._asked == "auto"
                self.operations = fastest.backends(shape) if auto else dict(operations.ALL_OWN)
        self._take_over_from_first()

    def _choose(self) -> None:
        self.kept = {}
        if self.kernels == "cpu":
            with _deterministic(self.deterministic):
                asked = screen.asked_for()
                best = screen.best(self._d_in) if asked == "auto" else asked
                self.kept = {"product": matmul.faster(), "screen": best}

    def _take_over_from_first(self) -> None:
        """Let all processes compute as the first does; another backend is found out elsewhere."""
        first, kept, backends = distributed.everyones((self.kernels, self.kept, self.operations))[0]
        if self.kernels != first:
            return
        for name, chosen in kept.items():
            if chosen not in _usable(name):
                raise InputError(
                    f"the first process computes with a {name} that this machine does not have",
                    where=f"rank {distributed.rank()}",
                    given=chosen,
                    allowed=_usable(name),
                )
        self.kept, self.operations = dict(kept), dict(backends)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which kernels compute as the run does."""
        with kernels.using(self.kernels), _deterministic(self.deterministic):
            if not self.kept:
                yield
                return
            products, screens = matmul.using(self.kept["product"]), self.kept["screen"]
            with products, screen.keeping(screens), operations.using(self.operations):
                yield

    def state_dict(self) -> dict[str, Any]:
        """The choices; JSON-able."""
        return {
            "kernels": self.kernels,
            **self.kept,
            **({"operations": self.operations} if self.kept else {}),
            "deterministic": self.deterministic,
            "threads": torch.get_num_threads(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, where: str) -> None:
        """Take over the choices of a checkpoint, unless others are asked for.

        Raises InputError if that cannot be used here.
        """
        before = str(state["kernels"])
        if before != self.kernels and self._asked != "auto":
            say(
                f"{where}: goes on with the kernels {self.kernels} after {before}: its bits are "
                "not those of one run of either"
            )
            return
        self._require("kernels", before, self._usable, where)
        if before != self.kernels:
            self.kernels = before
            self._choose()
        for name in self.kept:
            asked = screen.asked_for() if name == "screen" else "auto"
            if asked == "auto":
                self._require(name, str(state[name]), _usable(name), where)
                self.kept[name] = str(state[name])
        self.operations = self._operations_before(state, where) if self.kept else {}
        threads = torch.get_num_threads()
        if state["threads"] != threads and not self.deterministic:
            say(
                f"{where}: goes on with {threads} threads after {state['threads']}: last bits may "
                "differ, but for runs that are deterministic"
            )

    def _operations_before(self, state: Mapping[str, Any], where: str) -> dict[str, str]:
        """The backend of each operation in a checkpoint; older ones had one backend for all."""
        before = {**operations.ALL_OWN, **state.get("operations", {})}
        for name, backend in before.items():
            known = (operations.OWN, operations.OTHER) if name in operations.OPERATIONS else ()
            self._require(f"the operation {name} of the backend", str(backend), list(known), where)
        if self._asked == "auto" or before == self.operations:
            return before
        theirs = ", ".join(name for name, backend in before.items() if backend != operations.OWN)
        say(
            f"{where}: goes on with the kernels {self.kernels} alone, where {theirs} went by "
            "torch's operators: its bits are not those of one run of either"
        )
        return self.operations

    def _require(self, what: str, before: str, usable: list[str], where: str) -> None:
        if before not in usable:
            raise InputError(
                f"was trained with {what} {before!r}, which this machine does not have, so it "
                "cannot go on bit for bit; to go on with other kernels, name them by "
                "trainer.kernels or SAESCOPE_KERNELS",
                where=where,
                allowed=[each for each in self._usable if each != before],
            )


def _usable(name: str) -> list[str]:
    """What can be chosen as product, or screen, on this machine."""
    if name == "product":
        return matmul.usable()
    return ["none", *filter(screen.usable, screen.SCREENS)]


@contextmanager
def _deterministic(really: bool) -> Iterator[None]:
    if not really:
        yield
        return
    os.environ.setdefault(_WORKSPACE, ":4096:8")  # without it cuBLAS may not repeat itself
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # all of it is written anyway
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        deterministic.fill_uninitialized_memory = fills
