"""Chosen entries: values and gradients against a dense float64 objective."""

import pytest
import torch

from sae import kernels
from sae.kernels import torch_backend
from sae.kernels.codes import SparseCodes, csr_of


def problem(share: float) -> tuple[torch.Tensor, ...]:
    """x, W_enc_T, b_enc, W_dec in float64 and a mask with about `share` of the entries."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    mask = torch.rand(13, 70, generator=generator) < share
    mask[4] = False  # a row without entries
    return normal(13, 5), normal(70, 5), normal(70), normal(70, 6), mask


@pytest.mark.parametrize("backend", sorted(kernels.BACKENDS))
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_selected_entries_differentiate_like_a_dense_mask(
    backend: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse codes go through bags, full ones through dense products; both are the same."""
    monkeypatch.setenv("SAESCOPE_KERNELS", backend)
    x, W_enc_T, b_enc, W_dec, mask = problem(share)
    row_ptr, index = csr_of(mask)
    value = kernels.encode_selected(x, W_enc_T, b_enc, row_ptr, index)
    again = kernels.encode_selected(x, W_enc_T, b_enc, row_ptr, index, known=value.detach())
    assert torch.equal(value, again)
    out = kernels.decode(row_ptr, index, value * again, W_dec)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    found = torch.autograd.grad((out * weight).sum(), (x, W_enc_T, b_enc, W_dec), allow_unused=True)
    dense = (x @ W_enc_T.T + b_enc).square() * mask @ W_dec
    expected = torch.autograd.grad((dense * weight).sum(), (x, W_enc_T, b_enc, W_dec))
    torch.testing.assert_close(out, dense)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_selected_without_a_bias() -> None:
    x, W_enc_T, _, _, mask = problem(0.1)
    row_ptr, index = csr_of(mask)
    value = kernels.encode_selected(x, W_enc_T, None, row_ptr, index)
    torch.testing.assert_close(value, (x @ W_enc_T.T)[mask])


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_encode_above_is_the_dense_mask(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "_CHUNK_ELEMENTS", 4 * 70)  # several chunks of rows
    x, W_enc_T, b_enc, _, _ = problem(0.0)
    each = torch.full((70,), threshold, dtype=torch.float64)
    row_ptr, index, value = kernels.encode_above(x, W_enc_T, b_enc, each)
    pre = x @ W_enc_T.T + b_enc
    expected = pre * (pre > threshold)
    torch.testing.assert_close(SparseCodes(row_ptr, index, value, 70).dense(), expected)
    (gradient,) = torch.autograd.grad(value.square().sum(), b_enc)
    torch.testing.assert_close(gradient, 2 * expected.sum(0))


def test_codes_of_a_single_column_of_a_wider_selection() -> None:
    """Such a slice is strided even when flattened, which the bag operators refuse."""
    index, value = torch.tensor([[3, 1], [0, 2]]), torch.rand(2, 2, requires_grad=True)
    W_dec = torch.randn(5, 3, requires_grad=True)
    codes = SparseCodes.from_fixed(index[:, :1], value[:, :1], 100)
    out = kernels.decode(codes.row_ptr, codes.index, codes.value, torch.cat([W_dec] * 20))
    out.sum().backward()
    torch.testing.assert_close(out, value[:, :1] * W_dec[index[:, 0]])
