"""The numerical choices of a run: kernels, matrix product, determinism.

They decide its bits besides its configuration and its data.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from sae import kernels
from sae.kernels import matmul, screen
from saescope.errors import InputError
from saescope.progress import say

KernelsKind = Literal["auto", "reference", "torch", "cpu", "triton"]
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class Numerics:
    """The kernels of one run: chosen once, and kept when the run is resumed.

    With the `cpu` backend, two further choices are made by timing: which library multiplies
    matrices, and which screen finds the candidates of a top-k before it.

    Args:
        asked: a backend, or auto; SAESCOPE_KERNELS comes before it.
        deterministic: sums have an order that neither chance nor the number of threads decides.
        like: a tensor of the type and on the device of what is computed.
        d_in: width of what is encoded.

    Raises InputError if the backend that is asked for cannot be used here.
    """

    def __init__(self, asked: KernelsKind, *, deterministic: bool, like: Tensor, d_in: int) -> None:
        with kernels.using(asked):
            self._asked, self.kernels = kernels.asked_for(), kernels.backend(like)
        self._usable, self._d_in = kernels.available(like), d_in
        self.deterministic = deterministic
        self.kept: dict[str, str] = {}
        """choices within the backend, by what is chosen"""
        if self._asked not in ("auto", self.kernels):
            raise InputError(
                "these kernels cannot be used here",
                where="trainer.kernels",
                given=self._asked,
                allowed=("auto", *self._usable),
            )
        self._choose()

    def _choose(self) -> None:
        self.kept = {}
        if self.kernels == "cpu":
            with _deterministic(self.deterministic):
                asked = screen.asked_for()
                best = screen.best(self._d_in) if asked == "auto" else asked
                self.kept = {"product": matmul.faster(), "screen": best}

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which kernels compute as the run does."""
        with kernels.using(self.kernels), _deterministic(self.deterministic):
            if not self.kept:
                yield
                return
            with matmul.using(self.kept["product"]), screen.keeping(self.kept["screen"]):
                yield

    def state_dict(self) -> dict[str, Any]:
        """The choices; JSON-able."""
        return {
            "kernels": self.kernels,
            **self.kept,
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
            usable = matmul.usable() if name == "product" else _screens()
            asked = screen.asked_for() if name == "screen" else "auto"
            if asked == "auto":
                self._require(name, str(state[name]), usable, where)
                self.kept[name] = str(state[name])
        threads = torch.get_num_threads()
        if state["threads"] != threads and not self.deterministic:
            say(
                f"{where}: goes on with {threads} threads after {state['threads']}: last bits may "
                "differ, but for runs that are deterministic"
            )

    def _require(self, what: str, before: str, usable: list[str], where: str) -> None:
        if before not in usable:
            raise InputError(
                f"was trained with {what} {before!r}, which this machine does not have, so it "
                "cannot go on bit for bit; to go on with other kernels, name them by "
                "trainer.kernels or SAESCOPE_KERNELS",
                where=where,
                allowed=[each for each in self._usable if each != before],
            )


def _screens() -> list[str]:
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
