"""Effects on logits against the model's own final norm and unembedding, differentiated exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activations import load_model
from sae.indexing.build import direct_logits
from tests.tiny import ARCHITECTURES, make_tiny_model


def through_the_model(model, h: Tensor, directions: Tensor) -> Tensor:
    """d logits / d direction at h [n, d_vocab], by float64 automatic differentiation."""
    adapter = model.adapter
    norm = model.hf.get_submodule(adapter.get_component_mapping()["ln_final"].name).double()
    w_u = model.hf.get_output_embeddings().weight.double()

    def logits(x: Tensor) -> Tensor:
        return norm(x) @ w_u.T

    rows: list[Any] = [
        torch.autograd.functional.jvp(logits, h, direction)[1] for direction in directions
    ]
    return torch.stack(rows).detach()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_effects_are_the_derivatives_of_the_logits(tmp_path: Path, architecture: str) -> None:
    model = load_model(str(make_tiny_model(tmp_path, architecture)), dtype="float32")
    centres = architecture in ("gpt2", "gpt_neox")
    assert model.final_norm_centres == centres
    W_U, weight = model.unembedding()
    torch.manual_seed(0)
    h = torch.randn(model.d_model, dtype=torch.float64)
    directions = torch.randn(5, model.d_model, dtype=torch.float64) + 2.0
    # along h the norm's scale changes, which is not part of the direct effect
    seen = h - h.mean() if centres else h
    directions -= (directions @ seen / (seen @ seen))[:, None] * seen
    found = direct_logits(directions.float(), W_U, weight, centred=centres).double()
    exact = through_the_model(model, h, directions)
    exact = exact - exact.mean(-1, keepdim=True)
    scale = (exact * found).sum() / (found * found).sum()
    assert scale > 0
    assert (scale * found - exact).norm() < 1e-5 * exact.norm()
    if centres:
        without = direct_logits(directions.float(), W_U, weight).double()
        assert (scale * without - exact).norm() > 0.01 * exact.norm()
