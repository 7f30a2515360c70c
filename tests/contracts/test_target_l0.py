"""A target L0 is reached, or it is said that it is not: every architecture, short runs."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.architectures import architecture, list_architectures
from sae.core.batch import RawBatch
from sae.core.normaliser import Normaliser
from sae.training.l0_controller import REACHED, L0Controller
from sae.training.trainer import Trainer, TrainerConfig

D_IN, D_SAE, BATCH = 32, 256, 256
OPTIONS: dict[str, dict[str, Any]] = {"transcoder": {"activation": "relu"}}
OPTIONS["skip_transcoder"] = OPTIONS["transcoder"]
NORM_WEIGHTED = ["relu", "crosscoder", "transcoder", "skip_transcoder"]


def rows(n: int, seed: int) -> Tensor:
    """Sums of a few of 96 directions, about a mean."""
    directions = torch.randn(96, D_IN, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, 96, generator=generator) < 4 / 96
    return (active * (1 + torch.rand(n, 96, generator=generator))) @ directions + 0.5


def raw(kind: str, x: Tensor) -> RawBatch:
    """x, and what a transcoder is to make of it."""
    if not architecture(kind).transcodes:
        return RawBatch(x, labels=torch.arange(len(x)))  # as if all were of one text
    weights = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(8))
    return RawBatch(x, torch.relu(x @ weights))


class Batches:
    def __init__(self, kind: str) -> None:
        self.kind, self.step = kind, 0

    def __iter__(self) -> Iterator[RawBatch]:
        while True:
            self.step += 1
            yield raw(self.kind, rows(BATCH, self.step))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def fit(x: Tensor) -> Normaliser:
    square = float(x.double().square().sum(1).mean())
    return Normaliser.fit("unit_mean_square", mean=x.double().mean(0), mean_square=square)


def trained(
    kind: str, target: float, folder: Path, *, steps: int, d_sae: int = D_SAE, **options: Any
) -> Trainer:
    torch.manual_seed(0)
    cls = architecture(kind)
    config = cls.Config(d_sae=d_sae, **options).with_target_l0(target)
    sae = cls(config, D_IN, D_IN if cls.transcodes else None)
    some = raw(kind, rows(4000, 10**6))
    sae.normaliser = fit(some.x)
    if cls.concatenates:
        sae.normaliser = Normaliser.side_by_side([fit(part) for part in some.x.split(D_IN // 2, 1)])
        sae.metadata["site_widths"] = [D_IN // 2, D_IN // 2]
    if some.target is not None:
        sae.output_normaliser = fit(some.target)
    held_out = raw(kind, rows(2000, 2 * 10**6))
    trainer = Trainer(
        sae,
        Batches(kind),
        TrainerConfig(batch_size=BATCH, target_l0=target, lr=2e-3),
        total_steps=steps,
        held_out=lambda: iter([held_out]),
        folder=folder,
    )
    trainer.run()
    return trainer


@pytest.mark.parametrize("kind", sorted(list_architectures()))
@pytest.mark.parametrize(("target", "d_sae"), [(8, 64), (60, 64)])
def test_it_is_reached_or_said_not_to_be(
    kind: str, target: int, d_sae: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dict(OPTIONS.get(kind, {}))
    names = {each.name for each in dataclasses.fields(architecture(kind).Config)}
    options |= {"n_candidates": 64} if "n_candidates" in names else {}
    trainer = trained(kind, target, tmp_path, steps=60, d_sae=d_sae, **options)
    l0, said = trainer.last_held_out["l0"], capsys.readouterr().out
    reached = abs(l0 - target) <= REACHED * target
    assert trainer.target_reached == reached
    assert ("target_l0" in said and f"is not reached: L0 {l0:.2f}" in said) == (not reached)


@pytest.mark.parametrize("kind", NORM_WEIGHTED)
def test_norm_weighted_penalties_do_not_collapse(kind: str, tmp_path: Path) -> None:
    """A penalty that winds up shrinks decoder norms to nothing before features fall silent."""
    trainer = trained(kind, 12.0, tmp_path, steps=300, **OPTIONS.get(kind, {}))
    assert trainer.last_held_out["fvu"] < 0.9
    assert 6 < trainer.last_held_out["l0"] < 36


def test_a_penalty_that_outweighs_the_error_grows_no_further() -> None:
    def penalty_after(terms: dict[str, float]) -> float:
        controller = L0Controller(10.0, total_steps=300)
        for step in range(150):
            controller.update(40.0, step, terms)  # and L0 does not answer
        return controller.penalty

    free = penalty_after({"loss": 1.0, "fvu": 0.5})
    assert free > 1000
    assert penalty_after({"loss": 5.4, "fvu": 0.5, "l1": 3.0}) == free
    assert penalty_after({"loss": 5.6, "fvu": 0.5, "l1": 3.0}) < 2
    # and features that add nothing make it let go
    assert penalty_after({"loss": 1.0, "fvu": 0.25, "l1": 0.11}) == free
    assert penalty_after({"loss": 1.0, "fvu": 0.25, "l1": 0.09}) < 0.01


@pytest.mark.parametrize("parametrisation", ["theta", "log"])
def test_jumprelu_comes_as_near_as_its_pre_activations_allow(
    parametrisation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trained(
        "jumprelu", 60.0, tmp_path, steps=5, d_sae=64, parametrisation=parametrisation
    )
    sae, x = trainer.sae, rows(2000, 2 * 10**6)
    y = sae.normaliser.apply(x)
    positive = float((sae.encoder_input(y) @ sae.W_enc_T.T + sae.b_enc > 0).sum(1).double().mean())
    assert 20 < positive < 50
    assert trainer.last_held_out["l0"] == pytest.approx(positive, abs=0.01)
    said = capsys.readouterr().out
    assert f"an L0 of 60 cannot be reached by thresholds: {positive:.1f} pre-activations" in said
    assert "target_l0 60 is not reached" in said
