"""Training with the fast kernels is training: loss curves beside those of dense products.

The truth is the dense reference in float64. A fast backend may be as far from it as dense products
in float32 are, give or take what such small numbers scatter by.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sae import kernels
from sae.architectures import architecture, list_architectures
from sae.core.normaliser import Normaliser
from sae.kernels import screen
from sae.training.trainer import Trainer, TrainerConfig
from tests.unit.test_trainer import Stream

BATCH, D_IN, D_SAE, K = 192, 64, 160, 6
WIDE = 1100
"""features that the cpu backend screens before it multiplies them exactly"""
FAST = [name for name in ("torch", "cpu") if name in kernels.available()]
SCATTER, FLOOR = 4.0, 1e-6
ONE_TIE = 3e-3
"""what a choice between two equal features, made otherwise by rounding, may do to the curve"""


def batches(steps: int) -> list[torch.Tensor]:
    """Sparse mixtures of directions, with noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(80, D_IN, generator=generator)
    made = []
    for _ in range(steps):
        on = (torch.rand(BATCH, 80, generator=generator) < 0.06).float()
        size = on * torch.rand(BATCH, 80, generator=generator)
        noise = 0.05 * torch.randn(BATCH, D_IN, generator=generator)
        made.append(size @ directions + noise)
    return made


@functools.cache
def curve(
    kind: str, name: str, steps: int, d_sae: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Loss of each step, float64 [steps]."""
    torch.manual_seed(0)
    names = architecture(kind).Config.__dataclass_fields__
    settings: dict[str, Any] = {"k": K} if "k" in names else {}
    sae = architecture(kind)(architecture(kind).Config(d_sae=d_sae, **settings), D_IN).to(dtype)
    data = batches(steps)
    sae.normaliser = Normaliser.identity(D_IN, float(torch.cat(data).var(0).sum()))
    config = TrainerConfig(
        batch_size=BATCH, lr=1e-3, kernels=name, dead_after_tokens=8 * BATCH,  # type: ignore[arg-type]
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            sae, Stream(), config, total_steps=steps, held_out=lambda: iter(data[:1]),
            folder=Path(folder),
        )  # fmt: skip
        terms = [trainer.train_step(x.to(dtype)) for x in data]
    if steps > 100:
        assert any(each["auxk"] > 0 for each in terms)  # dead features take part
        assert terms[-1]["fvu"] < 0.5  # and there is something to learn
    return torch.tensor([each["loss"] for each in terms], dtype=torch.float64)


def errors(kind: str, name: str, steps: int, d_sae: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative errors of each step's loss, of dense float32 (largest so far) and of a backend."""
    truth = curve(kind, "reference", steps, d_sae, torch.float64)
    dense = (curve(kind, "reference", steps, d_sae) / truth - 1).abs().cummax(0).values
    return dense, (curve(kind, name, steps, d_sae) / truth - 1).abs()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_200_steps_of_topk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find, screened = screen.find, []

    def remember(*given: Any, **more: Any) -> screen.Found | None:
        screened.append(find(*given, **more))
        return screened[-1]

    monkeypatch.setattr(screen, "find", remember)
    dense, found = errors("topk", name, 200, WIDE)
    assert (found <= SCATTER * dense + ONE_TIE).all()
    assert (found <= SCATTER * dense + FLOOR)[:25].all()
    if name == "cpu" and screen.best(D_IN) != "none":
        assert sum(each is not None for each in screened) >= 200


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    "kind",
    sorted(k for k, cls in list_architectures().items() if not cls.Config().needs_neighbours),
)
def test_some_steps_of_every_architecture(kind: str, name: str) -> None:
    dense, found = errors(kind, name, 12, D_SAE)
    assert (found <= SCATTER * dense + FLOOR)[:5].all(), found
    assert (found <= SCATTER * dense + ONE_TIE).all(), found
