"""Our trainer's step, and the dense baselines, as `saescope bench` has them."""

import step_protocol
import torch
from torch import Tensor

from sae.bench.dense import DenseStep
from sae.bench.inputs import Inputs
from sae.bench.steps import Setting, make_stepper
from saescope import __version__


class Step:
    """What a setting of `saescope bench` steps."""

    def __init__(self, given: dict[str, Tensor], kind: str, l0: float, setting: str) -> None:
        inputs = Inputs(**given)
        self.inner = make_stepper(Setting(setting), inputs, kind, l0)
        dense = isinstance(self.inner, DenseStep)
        self.version = torch.__version__ if dense else __version__
        self.options = "fused Adam" if dense else ""

    def mark(self, dead: Tensor) -> None:
        self.inner.mark(dead)

    def step(self, x: Tensor) -> None:
        self.inner.step(x)

    def found(self, x: Tensor) -> dict[str, float]:
        dead = self.inner.found["dead"]
        return {**self.inner.measure(x), "dead": dead}

    def close(self) -> None:
        """Nothing outlives it."""


if __name__ == "__main__":
    step_protocol.serve(Step)
