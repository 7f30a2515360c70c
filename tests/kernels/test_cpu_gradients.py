"""Gradients through the C++ backend against dense autograd in float64."""

import pytest
import torch
from torch import Tensor

from sae import kernels
from sae.kernels import cpp_backend
from tests.kernels.cases import Random, assert_as_good, chosen

pytestmark = [
    pytest.mark.skipif(not cpp_backend.usable(), reason="no C++ compiler"),
    pytest.mark.usefixtures("no_screen"),
]


@pytest.mark.parametrize("shape", [(5, 7, 11, 3), (50, 20, 600, 30), (300, 33, 90, 2)])
@pytest.mark.parametrize("selection", ["top", "signed", "above", "batch"])
def test_gradients(
    selection: str, shape: tuple[int, int, int, int], sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole autoencoder's gradients: this backend's, torch's, and dense float64 autograd."""
    batch, d, d_sae, k = shape
    random = Random(shape)
    given = [
        random.normal(batch, d), random.normal(d_sae, d), random.normal(d_sae),
        random.normal(d_sae, d), random.normal(d),
    ]  # fmt: skip
    leaves = [each.double().requires_grad_() for each in given]
    weight = torch.arange(batch, dtype=torch.float64).cos()
    x, W, b, V, c = leaves
    pre = x @ W.T + b
    mask = _selected(selection, pre.detach(), k)
    dense = torch.where(mask, pre if selection == "signed" else pre.relu(), 0)
    (weight @ (dense @ V + c - x).square().sum(1) + (dense @ V).sin().sum()).backward()
    exact = [leaf.grad for leaf in leaves]
    found = {}
    for name in ("cpu", "torch"):
        monkeypatch.setenv("SAESCOPE_KERNELS", name)
        leaves = [each.clone().requires_grad_() for each in given]
        x, W, b, V, c = leaves
        codes = _encoded(selection, x, W, b, k)
        squared, _ = kernels.decode_error(*codes, V, c, x)
        (weight.float() @ squared + kernels.decode(*codes, V).sin().sum()).backward()
        found[name] = [leaf.grad for leaf in leaves]
    for mine, torchs, truth in zip(found["cpu"], found["torch"], exact, strict=True):
        assert mine is not None
        assert torchs is not None
        assert truth is not None
        assert_as_good(mine, torchs, truth, roundings=16)


def _selected(selection: str, pre: Tensor, k: int) -> Tensor:
    if selection == "above":
        return pre > 1
    if selection == "batch":
        return pre >= pre.reshape(-1).topk(k * len(pre)).values[-1]
    index = chosen(pre, k, signed=selection == "signed")
    return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, index, True)


def _encoded(
    selection: str, x: Tensor, W: Tensor, b: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    if selection == "above":
        return kernels.encode_above(x, W, b, 1.0)
    if selection == "batch":
        return kernels.encode_top_of_batch(x, W, b, k * len(x))
    index, value = kernels.encode_topk(x, W, b, k, signed=selection == "signed")
    return torch.arange(len(x) + 1) * k, index.reshape(-1), value.reshape(-1)
