"""Every backend against the dense reference in float64: both passes, odd shapes, ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import kernels
from sae.kernels import reference_backend, torch_backend
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError

SHAPES = [(1, 1, 1, 1), (3, 5, 7, 2), (17, 33, 65, 9), (64, 24, 100, 100), (40, 8, 300, 1)]


def problem(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, d_in, d_sae, _ = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    return random(batch, d_in), random(d_sae, d_in), random(d_sae)


@pytest.mark.parametrize("shape", SHAPES)
def test_encode_topk(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch_backend, "_CHUNK_ELEMENTS", 3 * shape[2]
    )  # several chunks, the last short
    results = []
    for name in ("reference", "torch"):
        monkeypatch.setenv("SAESCOPE_KERNELS", name)
        x, W, b = problem(shape)
        index, value = kernels.encode_topk(x, W, b, shape[3])
        dense = SparseCodes.from_fixed(index, value, shape[2]).dense()
        weight = torch.arange(1.0, dense.numel() + 1, dtype=torch.float64).view_as(dense).cos()
        (dense * weight).sum().backward()
        results.append((dense.detach(), x.grad, W.grad, b.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_decode_gradcheck(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_KERNELS", backend)
    row_ptr = torch.tensor([0, 2, 2, 5])  # the middle row is empty
    index = torch.tensor([1, 3, 0, 3, 2])
    value = torch.randn(5, dtype=torch.float64, requires_grad=True)
    W_dec = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [value[0] * W_dec[1] + value[1] * W_dec[3], 0 * W_dec[0],
         value[2] * W_dec[0] + value[3] * W_dec[3] + value[4] * W_dec[2]]
    )  # fmt: skip
    torch.testing.assert_close(kernels.decode(row_ptr, index, value, W_dec), expected)
    inputs = (value, W_dec)
    assert torch.autograd.gradcheck(lambda v, w: kernels.decode(row_ptr, index, v, w), inputs)


def test_weight_gradient_counts_every_entry() -> None:
    row_ptr, index = torch.tensor([0, 2, 2, 4]), torch.tensor([1, 1, 0, 1])
    value = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 1.0]])
    found = torch_backend.weight_gradient(row_ptr, index, value, rows, 3)
    assert found.tolist() == [[0, 3], [3, 4], [0, 0]]


@pytest.mark.parametrize(("width", "k"), [(16 * 8, 2), (16 * 9, 2), (100, 3), (64, 4), (640, 10)])
def test_topk_by_groups_is_exact(width: int, k: int) -> None:
    generator = torch.Generator().manual_seed(width)
    pre = torch.randn(50, width, generator=generator)
    pre[:10] = pre[:10].round()  # ties
    pre[10:20] = -torch.arange(width).float()  # sorted rows
    value, index = torch_backend.topk_by_groups(pre, k)
    assert torch.equal(value.sort(descending=True).values, pre.topk(k).values)
    assert torch.equal(pre.gather(1, index), value)
    assert all(len(set(row)) == k for row in index.tolist())


def test_ties_give_k_entries() -> None:
    x, W = torch.ones(2, 3), torch.ones(6, 3)
    for backend in (reference_backend, torch_backend):
        index, value = backend.topk(x, W, torch.zeros(6), 4)
        assert value.tolist() == [[3.0] * 4] * 2
        assert all(len(set(row)) == 4 for row in index.tolist())


def test_no_gradient_through_rectified_entries() -> None:
    """An entry that TopK picked but ReLU cut must not move its feature."""
    x = torch.tensor([[1.0]])
    W, b = torch.tensor([[1.0], [-1.0]], requires_grad=True), torch.zeros(2, requires_grad=True)
    _, value = kernels.encode_topk(x, W, b, 2)
    value.sum().backward()
    assert W.grad is not None
    assert b.grad is not None
    assert W.grad.tolist() == [[1.0], [0.0]]
    assert b.grad.tolist() == [1.0, 0.0]


def test_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_KERNELS", "reference")
    assert kernels.backend() == "reference"
    monkeypatch.setenv("SAESCOPE_KERNELS", "cuda")
    with pytest.raises(InputError, match="allowed: auto, reference, torch"):
        kernels.backend()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.0, 1.5, -2.0]), min_size=4, max_size=4),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_codes_round_trip(values: list[list[float]]) -> None:
    dense = torch.tensor(values)
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.dense(), dense)
    assert torch.equal(codes.l0(), (dense != 0).sum(1))
    assert torch.equal(codes.compact().dense(), dense)
    assert torch.equal(SparseCodes.concatenate([codes, codes]).dense(), torch.cat([dense, dense]))
    wanted = torch.tensor([2, 0])
    assert torch.equal(codes.columns(wanted), dense[:, wanted])
