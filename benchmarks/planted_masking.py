"""Masked against plain reconstruction where a dictionary can fit noise ("Hiding Data Helps").

The setting of Chidambaram et al. (2023, section 5): x = A z + noise, few rows, k Gaussian
coefficients with ||z|| = 1 each, and a dictionary several times as wide as the true one, which
starts at other rows, with or without the true atoms among them. Codes are those of orthogonal
matching pursuit. Plain reconstruction is then lowered by atoms that fit noise; masked, the code is
made from the visible coordinates and judged by the hidden ones, whose noise it has not seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sae.architectures.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from sae.core.normaliser import Normaliser
from sae.evaluation.recovery import measure_recovery
from sae.training.batch_maker import LossConfig
from sae.training.trainer import Trainer, TrainerConfig

Start = Literal["truth", "samples"]


@dataclass(frozen=True, kw_only=True)
class Hiding:
    """Sizes of the experiment: the paper's, with 60 passes over the rows instead of 500."""

    d_in: int = 100
    true: int = 200
    d_sae: int = 1000
    k: int = 5
    visible: float = 0.9
    rows: int = 1000
    batch_size: int = 200
    steps: int = 300
    lr: float = 1e-3


class Rows:
    """Rows of a random dictionary, read again and again in new orders."""

    def __init__(self, size: Hiding, *, noise: float, seed: int) -> None:
        self.size, self.noise, self.seed, self.step = size, noise, seed, 0
        atoms = torch.randn(size.true, size.d_in, generator=self._generator(0))
        self.directions = functional.normalize(atoms, dim=1)

    def _generator(self, number: int) -> torch.Generator:
        # away from the small seeds of an SAE's own initial values
        return torch.Generator().manual_seed(1_000_000 * (1 + self.seed) + number)

    def sample(self, rows: int, number: int) -> Tensor:
        """Rows [rows, d_in]; equal numbers (1 and on) give equal rows."""
        size, generator = self.size, self._generator(number)
        places = torch.rand(rows, size.true, generator=generator).topk(size.k).indices
        value = functional.normalize(torch.randn(rows, size.k, generator=generator), dim=1)
        clean = torch.zeros(rows, size.true).scatter(1, places, value) @ self.directions
        return clean + self.noise * torch.randn(clean.shape, generator=generator)

    def __iter__(self) -> Iterator[Tensor]:
        size = self.size
        x, per_pass = self.sample(size.rows, 3), size.rows // size.batch_size
        while True:
            number, place = divmod(self.step, per_pass)
            order = torch.randperm(size.rows, generator=self._generator(10 + number))
            self.step += 1
            yield x[order[place * size.batch_size :][: size.batch_size]]

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a place."""
        self.step = int(state["step"])


def distance(
    size: Hiding, folder: Path, *, noise: float, masked: bool, start: Start, seed: int = 0
) -> float:
    """Train, and give the paper's measure: mean over true atoms of min(1 - |cos|); 0 is best."""
    data = Rows(size, noise=noise, seed=seed)
    config = MatchingPursuitConfig(
        d_sae=size.d_sae, k=size.k, orthogonal=True, auxk_coefficient=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = MatchingPursuitSAE(config, size.d_in)
    held_out, points = data.sample(1000, 1), data.sample(size.d_sae, 2)
    sae.normaliser = Normaliser.identity(size.d_in, variance=float(held_out.square().sum(1).mean()))
    with torch.no_grad():
        sae.W_dec.copy_(points)
        if start == "truth":
            sae.W_dec[: size.true] = data.directions
        sae.normalise_decoder()
    trainer = Trainer(
        sae,
        data,
        TrainerConfig(
            batch_size=size.batch_size,
            lr=size.lr,
            evaluate_every=size.steps,
            checkpoint_every=size.steps,
            loss=LossConfig(visible_fraction=size.visible if masked else 1.0),
        ),
        total_steps=size.steps,
        held_out=lambda: iter([held_out]),
        folder=folder,
        seed=seed,
    )
    trained = trainer.run().fold()
    return 1 - measure_recovery(data.directions, trained.W_dec).mean
