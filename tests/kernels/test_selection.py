"""Selection over a batch: exactly what sorting the dense matrix gives, whatever is guessed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae import kernels
from sae.kernels import selection, torch_backend
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError

BACKENDS = ["reference", "torch", "cpu"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, parts and blocks even of small matrices, and samples of a few rows."""
    monkeypatch.setattr(torch_backend, "_CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(selection, "_BLOCK_ELEMENTS", 150)
    monkeypatch.setattr(selection, "_SAMPLE_ROWS", 6)


def as_problem(values: Tensor) -> tuple[Tensor, Tensor]:
    """x and W with x W^T = values to the bit."""
    return torch.eye(len(values), dtype=values.dtype), values.T.contiguous()


def as_mask(codes: tuple[Tensor, Tensor, Tensor], values: Tensor) -> Tensor:
    """Where the codes are, bool like values; their order and values are checked."""
    row_ptr, index, value = codes
    flat = SparseCodes(row_ptr, index, value, values.shape[1]).flat()
    assert (flat.diff() > 0).all()  # rising, none twice
    assert torch.equal(value, values.view(-1)[flat])
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[flat] = True
    return mask.view_as(values)


def top(values: Tensor, n: int, score: Tensor | None = None) -> Tensor:
    """The n largest positive of a matrix, of equals the first, as a mask."""
    score = (values if score is None else score).reshape(-1)
    order = score.nan_to_num(nan=-1.0, posinf=torch.inf).argsort(descending=True, stable=True)
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order[:n]] = True
    return mask.view_as(values) & (values > 0)


def top_each(values: Tensor, quota: Tensor) -> Tensor:
    """The same for each column, with its quota."""
    columns = [top(values[:, [j]], int(quota[j])) for j in range(values.shape[1])]
    return torch.cat(columns, dim=1)


def few_levels(rows: int, width: int, levels: int, seed: int) -> Tensor:
    """Whole numbers: many ties if levels are few."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels + 1, (rows, width), generator=generator).float()


hints = st.sampled_from([0.0, 1e-9, 0.5, 1.0, 3.0, 7.0, 1e9, float("inf"), float("nan")])
shapes = {
    "rows": st.integers(1, 90), "width": st.integers(1, 40), "levels": st.integers(1, 40),
    "seed": st.integers(0, 999),
}  # fmt: skip


# ---- the largest of the batch -----------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(**shapes, share=st.floats(0.001, 1.2), hint=hints, weighted=st.booleans())
def test_top_of_batch_is_exact(
    rows: int, width: int, levels: int, seed: int, share: float, hint: float, weighted: bool
) -> None:
    values = few_levels(rows, width, levels, seed)
    n = max(1, int(share * values.numel()))
    weight = 2.0 ** few_levels(1, width, 3, seed)[0] if weighted else None
    found = kernels.encode_top_of_batch(*as_problem(values), None, n, weight=weight, hint=hint)
    score = values if weight is None else values * weight
    assert torch.equal(as_mask(found, values), top(values, n, score))


@settings(max_examples=100, deadline=None)
@given(**shapes, share=st.floats(0.001, 1.0), excluded=st.floats(0.0, 1.0))
def test_excluded_entries_are_left_out(
    rows: int, width: int, levels: int, seed: int, share: float, excluded: float
) -> None:
    values = few_levels(rows, width, levels, seed)
    n = max(1, int(share * values.numel()))
    generator = torch.Generator().manual_seed(seed + 1)
    gone = torch.rand(rows, width, generator=generator) < excluded
    codes = SparseCodes.from_dense(gone.float())
    found = kernels.encode_top_of_batch(
        *as_problem(values), None, n, excluded=(codes.row_ptr, codes.index)
    )
    assert torch.equal(as_mask(found, values), top(values.masked_fill(gone, -1.0), n))


def awkward(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, W, b whose sample of rows, or first eighth, may say little of the whole [200, 30]."""
    torch.manual_seed(0)
    plain = torch.randn(200, 30)
    one_row, first, rare = plain - 9, plain.clone(), torch.full((200, 30), -1.0)
    one_row[77] = torch.rand(30) + 1
    first[:25] += 20
    rare[torch.randperm(200)[:40], 3] = torch.rand(40)
    x, W = as_problem({
        "plain": plain, "one row": one_row, "first rows": first, "rare": rare,
        "last rows": first.flip(0), "negative": -plain.abs(), "zero": torch.zeros(200, 30),
        "equal": torch.ones(200, 30), "damaged": plain, "all damaged": plain,
    }[kind])  # fmt: skip
    b = torch.zeros(30)
    if "damaged" in kind:
        x[17 if kind == "damaged" else slice(None)] = torch.nan
        W[5], b[8], b[9] = torch.nan, torch.inf, -torch.inf
    return x, W, b


KINDS = [
    "plain", "one row", "first rows", "last rows", "rare", "negative", "zero", "equal", "damaged",
    "all damaged",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hint", [0.0, 1e-3, 1.0, 5.0])
def test_awkward_batches(
    kind: str, backend: str, hint: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESCOPE_KERNELS", backend)
    x, W, b = awkward(kind)
    values = x @ W.T + b
    for n in (1, 20, 777, 5999, 6000, 10**9):
        found = kernels.encode_top_of_batch(x, W, b, n, hint=hint)
        assert torch.equal(as_mask(found, values), top(values, n)), n


class Watched:
    """The torch backend, and how many entries each call of `above` gave."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def above(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = torch_backend.above(*args)
        self.given.append(len(found[2]))
        return found


def test_entries_held_are_few_even_if_the_hint_is_far_too_low() -> None:
    torch.manual_seed(0)
    x, W = torch.randn(800, 8), torch.randn(100, 8)  # 40,000 positive
    for hint in (1e-6, 0.1, 0.0):
        watched = Watched()
        codes = selection.top_of_batch(watched, x, W, None, 800, hint=hint)  # type: ignore[arg-type]
        assert len(codes.value) == 800
        assert sum(watched.given) < 8000


def test_a_good_hint_spares_the_sample_and_a_bad_one_costs_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    x, W = torch.randn(800, 8), torch.randn(100, 8)
    last = float((x @ W.T).view(-1).sort(descending=True).values[799])
    sampled, sample = [], selection._sample
    monkeypatch.setattr(selection, "_sample", lambda *a: sampled.append(a[3]) or sample(*a))
    for hint, passes, samples in [(last, 1, [8]), (1.5 * last, 2, [8, 6]), (0.0, 1, [6])]:
        watched = Watched()
        sampled.clear()
        selection.top_of_batch(watched, x, W, None, 800, hint=hint)  # type: ignore[arg-type]
        assert len(watched.given) == passes
        assert sampled == samples


def test_values_do_not_depend_on_the_hint() -> None:
    """To the bit: a resumed run has no hint, and must go on as if it had."""
    torch.manual_seed(0)
    x, W, b = torch.randn(300, 24), torch.randn(70, 24), torch.randn(70)
    first, *others = (kernels.encode_top_of_batch(x, W, b, 500, hint=h) for h in (0, 0.1, 7.0, 99))
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_nothing_to_select_is_refused() -> None:
    with pytest.raises(InputError, match=r"nothing to select .*given: 0; allowed: at least 1"):
        kernels.encode_top_of_batch(torch.ones(2, 2), torch.ones(2, 2), None, 0)


def test_an_empty_batch_has_no_entries() -> None:
    x, W = torch.ones(0, 3), torch.ones(4, 3)
    row_ptr, index, value = kernels.encode_top_of_batch(x, W, None, 5)
    assert (row_ptr.tolist(), len(index), len(value)) == ([0], 0, 0)
    quota = torch.ones(4, dtype=torch.int64)
    row_ptr, index, value = kernels.encode_top_of_features(x, W, None, quota, torch.zeros(4))
    assert (row_ptr.tolist(), len(index), len(value)) == ([0], 0, 0)


# ---- the largest of each feature --------------------------------------------------------------


def quotas_for(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    quota = torch.randint(0, rows + 3, (width,), generator=generator)
    quota[::3] = quota[::3].clamp_max(2)
    return quota


@settings(max_examples=100, deadline=None)
@given(**shapes, hint=hints, mixed=st.booleans())
def test_top_of_features_is_exact(
    rows: int, width: int, levels: int, seed: int, hint: float, mixed: bool
) -> None:
    values, quota = few_levels(rows, width, levels, seed), quotas_for(rows, width, seed)
    each = torch.full((width,), hint)
    each[::2] = torch.where(torch.tensor(mixed), levels / 3, each[::2])
    found = kernels.encode_top_of_features(*as_problem(values), None, quota, each)
    assert torch.equal(as_mask(found, values), top_each(values, quota))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_awkward_features(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_KERNELS", backend)
    x, W, b = awkward(kind)
    values, quota = x @ W.T + b, quotas_for(200, 30, 0)
    for hint in (0.0, 0.5, 2.0, 9.0):
        found = kernels.encode_top_of_features(x, W, b, quota, torch.full((30,), hint))
        assert torch.equal(as_mask(found, values), top_each(values, quota)), hint


@pytest.mark.parametrize("rows", [1, 7, 16, 50, 200])
@pytest.mark.parametrize("kind", ["normal", "ties", "negative", "few"])
def test_columns_of_a_matrix(rows: int, kind: str) -> None:
    torch.manual_seed(rows)
    values = torch.randn(rows, 30)
    values = {
        "normal": values, "ties": values.round(), "negative": -values.abs(), "few": values - 2,
    }[kind]  # fmt: skip
    quota = quotas_for(rows, 30, rows).clamp_max(rows)
    row_ptr, index = selection.top_of_columns(values, quota)
    mask = torch.zeros(rows, 30, dtype=torch.bool)
    mask[torch.repeat_interleave(row_ptr.diff()), index] = True
    assert int(mask.sum()) == len(index)  # none twice
    assert torch.equal(mask, top_each(values, quota))


def test_good_hints_leave_few_features_to_encode_again() -> None:
    torch.manual_seed(0)
    x, W = torch.randn(800, 8), torch.randn(100, 8)
    quota = torch.randint(1, 40, (100,))
    ranked = (x @ W.T).sort(dim=0, descending=True).values
    last = ranked.gather(0, quota[None] - 1)[0]
    watched, again = Watched(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "top_of_columns", lambda *args: again.append(1))
        codes = selection.top_of_features(watched, x, W, None, quota, last)  # type: ignore[arg-type]
    assert len(codes.value) == int(quota.sum())
    assert not again
    assert sum(watched.given) < 8 * len(codes.value)  # of 42 as many in all
    watched = Watched()  # far too low
    selection.top_of_features(watched, x, W, None, quota.clamp_max(3), 1e-6 * last)  # type: ignore[arg-type]
    assert not watched.given


# ---- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["batch", "weighted", "features"])
def test_gradients_equal_a_dense_mask(
    which: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESCOPE_KERNELS", backend)
    torch.manual_seed(0)
    shapes = [(33, 5), (70, 5), (70,)]
    inputs = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in shapes]
    x, W, b = inputs
    values = x @ W.T + b
    weight, quota = torch.rand(70, dtype=torch.float64) + 0.5, quotas_for(33, 70, 0)
    if which == "features":
        codes = kernels.encode_top_of_features(x, W, b, quota, torch.rand(70))
        mask = top_each(values, quota)
    else:
        each = weight if which == "weighted" else None
        codes = kernels.encode_top_of_batch(x, W, b, 150, weight=each, hint=1.0)
        mask = top(values, 150, values if each is None else values * each)
    dense = SparseCodes(*codes, 70).dense()
    torch.testing.assert_close(dense, values * mask)
    slope = torch.linspace(-1, 1, dense.numel(), dtype=torch.float64).view_as(dense)
    found = torch.autograd.grad((dense.square() * slope).sum(), inputs)
    expected = torch.autograd.grad(((values * mask).square() * slope).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("which", ["batch", "features"])
def test_gradcheck(which: str) -> None:
    torch.manual_seed(0)
    inputs = [
        torch.randn(*size, dtype=torch.float64, requires_grad=True)
        for size in [(6, 4), (9, 4), (9,)]
    ]
    quota = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1, 2])

    def value(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        if which == "batch":
            return kernels.encode_top_of_batch(x, W, b, 11)[2]
        return kernels.encode_top_of_features(x, W, b, quota, torch.zeros(9))[2]

    assert torch.autograd.gradcheck(value, inputs)
