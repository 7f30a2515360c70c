"""SAEs find the features that made the data, better than one that was not trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.architectures import architecture, architectures
from sae.base import SparseAutoencoder
from sae.normaliser import Normaliser
from sae.training.trainer import Trainer, TrainerConfig

D_IN, TRUE, D_SAE, ACTIVE = 32, 64, 96, 4


class Planted:
    """Sparse non-negative sums of TRUE unit directions with Zipf frequencies, plus a mean."""

    def __init__(self) -> None:
        # a seed that nothing else uses: the SAE's own initial rows must not be these
        generator = torch.Generator().manual_seed(7)
        directions = torch.randn(TRUE, D_IN, generator=generator)
        self.directions = torch.nn.functional.normalize(directions, dim=1)
        self.mean = torch.randn(D_IN, generator=generator)
        frequency = 1 / torch.arange(1, TRUE + 1) ** 0.5
        self.frequency = ACTIVE * frequency / frequency.sum()
        self.step = 0

    def rows(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        on = torch.rand(n, TRUE, generator=generator) < self.frequency
        strength = 1 + torch.rand(n, TRUE, generator=generator)
        return (on * strength) @ self.directions + self.mean

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.step += 1
            yield self.rows(512, 1000 + self.step)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def recovered(self, sae: SparseAutoencoder) -> float:
        """Mean over true directions of the largest cosine with a decoder row."""
        unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
        return float((self.directions @ unit.T).amax(1).mean())


@pytest.mark.parametrize("kind", sorted(architectures()))
def test_recovers_planted_features(kind: str, tmp_path: Path) -> None:
    planted = Planted()
    names = architecture(kind).Config.__dataclass_fields__
    options: dict[str, Any] = {"k": 8} if "k" in names else {"l1_coefficient": 0.2}
    torch.manual_seed(0)
    sae = architecture(kind)(architecture(kind).Config(d_sae=D_SAE, **options), D_IN)
    sample = planted.rows(20_000, 1)
    sae.normaliser = Normaliser.fit(
        "unit_mean_square",
        mean=sample.double().mean(0),
        mean_square=float(sample.double().square().sum(1).mean()),
    )
    untrained = planted.recovered(sae)
    config = TrainerConfig(batch_size=512, lr=3e-3, dead_after_tokens=20_000, evaluate_every=1000)
    trainer = Trainer(
        sae,
        planted,
        config,
        total_steps=1000,
        held_out=lambda: iter([planted.rows(4000, 2)]),
        folder=tmp_path,
    )
    trainer.run()
    assert untrained < 0.65
    assert planted.recovered(sae) > 0.93
    assert trainer.last_held_out["fvu"] < 0.15
