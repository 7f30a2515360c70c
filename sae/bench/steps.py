"""Whole training steps: the trainer's own, and those of the dense baseline, on given tensors."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sae import kernels
from sae.architectures import architecture
from sae.bench.dense import KINDS, LR, SILENT, DenseStep, Products, ProductStep
from sae.bench.inputs import Inputs
from sae.core.base import SparseAutoencoder, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.normaliser import Normaliser
from sae.kernels import screen
from sae.training.trainer import Trainer, TrainerConfig
from saescope.errors import InputError

DENSE: dict[str, Products] = {
    "dense": "torch",
    "dense+onednn": "onednn",
    "dense+bf16": "bfloat16",
    "product": "torch",
    "product+onednn": "onednn",
}
"""settings of the baseline, and the encoder's product alone"""
SCREENS = ("int8", "int16", "bf16")
AUTO = "auto"
SETTINGS = (
    *DENSE,
    AUTO,
    *kernels.BACKENDS,
    *(f"cpu+{screen}" for screen in SCREENS),
)
"""what a step or an operation can run on: the dense baselines, what a run would choose here (auto),
or a backend of kernels; the exact float32 product chooses the features, or a screen of it in few
bits"""
_KERNELS, _SCREEN = "SAESCOPE_KERNELS", "SAESCOPE_SCREEN"
_STEPS = 1_000_000
"""length of the run that the steps are the first of"""


@dataclass(frozen=True)
class Setting:
    """A name of SETTINGS, taken apart."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in SETTINGS:
            raise InputError("no such setting", where="settings", given=self.name, allowed=SETTINGS)

    @property
    def backend(self) -> str:
        """The kernels that the setting uses; `reference` for the baseline."""
        return "reference" if self.name in DENSE else self.name.partition("+")[0]

    def screened_here(self) -> bool:
        """Whether the screen that is asked for, if one is, is there on this machine."""
        name = self.name.partition("+")[2] if self.backend == "cpu" else ""
        return not name or screen.usable(name)

    @contextmanager
    def active(self, like: Tensor) -> Iterator[None]:
        """Within the context kernels run on this, for tensors such as `like`.

        Raises InputError where they would run on something else.
        """
        screened = self.name.partition("+")[2] if self.backend == "cpu" else ""
        before = {name: os.environ.get(name) for name in (_KERNELS, _SCREEN)}
        auto = self.name == AUTO
        os.environ.update({_KERNELS: self.backend, _SCREEN: AUTO if auto else screened or "none"})
        try:
            found = kernels.backend(like)
            if found != self.backend and not auto:
                raise InputError(
                    f"these kernels cannot run here, on {like.dtype} on {like.device.type}",
                    where="settings",
                    given=self.name,
                    allowed=found,
                )
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


class Stepper(Protocol):
    """Something that takes training steps."""

    def mark(self, dead: Tensor) -> None:
        """Let features bool [d_sae] count as dead."""
        ...

    def step(self, x: Tensor) -> None:
        """One step on rows [batch, d_in]."""
        ...

    def measure(self, x: Tensor) -> dict[str, float]:
        """Mean "l0" and "squared_error" of rows [batch, d_in], selected as in training."""
        ...

    @property
    def found(self) -> dict[str, float]:
        """Of the last step: "l0" and "dead" at least."""
        ...


def make_stepper(
    setting: Setting, inputs: Inputs, kind: str, l0: float, *, precision: str = "float32"
) -> Stepper:
    """Our trainer, or the baseline, at the given weights.

    Raises InputError for an architecture that cannot be stepped on plain rows, or not densely.
    """
    if setting.name in DENSE:
        products = DENSE[setting.name]
        if products == "torch" and precision == "bfloat16":
            products = "bfloat16"
        cls = ProductStep if setting.name.startswith("product") else DenseStep
        return cls(inputs, kind, l0, products)
    return OurStep(setting, inputs, kind, l0, precision=precision)


class OurStep:
    """`Trainer.train_step`, with everything a real one does."""

    def __init__(
        self, setting: Setting, inputs: Inputs, kind: str, l0: float, *, precision: str = "float32"
    ) -> None:
        self.setting = setting
        folder = tempfile.mkdtemp(prefix="saescope-bench-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        device = inputs.x.device
        sae = make_sae(inputs, kind, l0).to(device)
        config = TrainerConfig(
            batch_size=inputs.x.shape[1],
            lr=LR,
            warmup_fraction=0.0,
            precision="bfloat16" if precision == "bfloat16" else "float32",
        )
        with setting.active(inputs.x):
            self.trainer = Trainer(
                sae,
                _NoBatches(),
                config,
                total_steps=_STEPS,
                held_out=lambda: (),
                folder=Path(folder),
                initialise=False,
            )
        self.found: dict[str, float] = {}

    def mark(self, dead: Tensor) -> None:
        """Let features bool [d_sae] count as dead."""
        self.trainer.tokens_since_fired[dead] = SILENT
        self.trainer.tokens = SILENT  # so many tokens have passed

    def step(self, x: Tensor) -> None:
        """One step on rows [batch, d_in]."""
        with self.setting.active(x):
            self.found = self.trainer.train_step(x)

    @torch.no_grad()
    def measure(self, x: Tensor) -> dict[str, float]:
        """Mean L0 and squared error of rows [batch, d_in]."""
        batch = TrainingBatch.of(x, variance=1.0, labels=torch.arange(len(x), device=x.device))
        state = TrainingState(dead=torch.zeros_like(self.trainer.tokens_since_fired > 0))
        with self.setting.active(x):
            output = self.trainer.sae.train().training_output(batch, state)
        l0 = float(output.counts.sum()) / len(x)
        return {"l0": l0, "squared_error": float(output.terms["fvu"])}


def make_sae(inputs: Inputs, kind: str, l0: float) -> SparseAutoencoder:
    """An SAE of an architecture, with the given weights where it has such.

    Raises InputError for one that reads or writes more than one site's rows.
    """
    cls = architecture(kind)
    if cls.transcodes or cls.concatenates:
        raise InputError(
            "reads or writes other rows than its input",
            where="architectures",
            given=kind,
            allowed=f"{', '.join(KINDS)} and others of one site",
        )
    config = cls.Config(d_sae=len(inputs.W_dec)).with_target_l0(l0)
    sae = cls(config, inputs.x.shape[-1])
    sae.normaliser = Normaliser.identity(sae.d_in, inputs.variance)
    with torch.no_grad():
        for each in fields(inputs):
            parameter = dict(sae.named_parameters()).get(each.name)
            if parameter is not None:
                parameter.copy_(getattr(inputs, each.name))
    return sae


class _NoBatches:
    """The trainer's stream; it is given its rows step by step instead."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state
