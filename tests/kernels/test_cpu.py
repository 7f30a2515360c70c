"""The C++ backend against dense products in float64: values, choices, gradients, threads."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import cpp_backend, reference_backend, torch_backend
from saescope.errors import InputError
from tests.kernels.cases import SHAPES, Random, assert_as_good, chosen, double

pytestmark = [
    pytest.mark.skipif(not cpp_backend.usable(), reason="no C++ compiler"),
    pytest.mark.usefixtures("no_screen"),
]


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_is_exact_and_takes_the_first_of_equals(
    shape: tuple[int, int, int, int], signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, d, d_sae, k = shape
    monkeypatch.setattr(
        cpp_backend, "_CHUNK_ROWS", batch // 3 + 1
    )  # several chunks, the last one short
    random = Random(shape)
    x, W, b = random.integers(batch, d), random.integers(d_sae, d), random.integers(d_sae)
    for bias in (None, b):
        pre = x.double() @ W.double().T + (0 if bias is None else bias.double())
        index, value = cpp_backend.topk(x, W, bias, k, signed=signed)
        assert torch.equal(index, chosen(pre, k, signed))
        assert torch.equal(value.double(), pre.gather(1, index))


@pytest.mark.parametrize("k", [1, 3, 64, 200, 700])
def test_topk_of_awkward_rows(k: int) -> None:
    d_sae = 701
    random, ramp = Random(k), torch.arange(d_sae).float()
    rows = [
        ramp, -ramp, torch.zeros(d_sae), -torch.zeros(d_sae), torch.full((d_sae,), -torch.inf),
        torch.full((d_sae,), torch.inf), random.normal(d_sae), random.integers(d_sae, most=1),
        torch.where(ramp == 500, 0.0, -torch.inf), torch.where(ramp < 3, torch.inf, ramp),
        random.normal(d_sae) * 1e-42, (ramp % 256).eq(7) * ramp,
    ]  # fmt: skip
    for row in rows:
        index, value = cpp_backend.topk(torch.zeros(1, 1), torch.zeros(d_sae, 1), row, k)
        assert torch.equal(index, chosen(row[None], k, signed=False))
        assert torch.equal(value, row[index])


def test_minus_zero_is_zero() -> None:
    """No product makes one here, but another library's may."""
    pre = torch.tensor([[-0.0, 0.0, -1.0, -0.0, 0.0]])
    index, value = torch.empty(1, 2, dtype=torch.int64), torch.empty(1, 2)
    work = torch.empty(10, dtype=torch.int64)
    cpp_backend._call("top_of_rows", pre, None, 1, 5, 2, False, 0, index, value, work, 1)
    assert index.tolist() == [[0, 1]]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("width", [5, 64, 300, 700, 3000])
def test_topk_counts_nan_as_the_largest(width: int, signed: bool) -> None:
    b = Random(width).normal(width)
    b[[1, width - 1]] = torch.nan
    for k in (1, 2, 4, width):
        index, value = cpp_backend.topk(
            torch.zeros(2, 1), torch.zeros(width, 1), b, k, signed=signed
        )
        assert torch.equal(value.isnan().sum(1), torch.tensor([min(k, 2)] * 2))
        assert all(len(set(row)) == k for row in index.tolist())
    index, value = cpp_backend.topk(torch.full((2, 1), torch.nan), torch.zeros(width, 1), b, 3)
    assert value.isnan().all()
    assert index.tolist() == [[0, 1, 2]] * 2
    row_ptr, _, value = cpp_backend.above(
        torch.zeros(2, 1), torch.zeros(width, 1), b, torch.full((width,), -torch.inf)
    )
    assert row_ptr.tolist() == [0, width - 2, 2 * width - 4]
    assert not value.isnan().any()


@pytest.mark.parametrize("shape", SHAPES)
def test_topk_of_random_rows(shape: tuple[int, int, int, int]) -> None:
    batch, d, d_sae, k = shape
    random = Random(shape)
    x, W, b = random.normal(batch, d), random.normal(d_sae, d), random.normal(d_sae)
    exact = reference_backend.topk(x.double(), W.double(), b.double(), k)[1].sort(1).values
    found, torchs = (
        each.topk(x, W, b, k)[1].sort(1).values for each in (cpp_backend, torch_backend)
    )
    assert_as_good(found, torchs, exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_above(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch, d, d_sae, _ = shape
    monkeypatch.setattr(cpp_backend, "_CHUNK_ROWS", batch // 3 + 1)
    random = Random(shape)
    x, W, b = random.integers(batch, d), random.integers(d_sae, d), random.integers(d_sae)
    x[::3] = 0  # rows that are empty without a bias
    bars = random.integers(d_sae).abs() * d**0.5
    for bias in (None, b):
        for threshold in (
            bars,
            torch.full_like(bars, -torch.inf),
            torch.full_like(bars, torch.inf),
        ):
            row_ptr, index, value = cpp_backend.above(x, W, bias, threshold)
            pre = x.double() @ W.double().T + (0 if bias is None else bias.double())
            mask = pre > threshold
            assert torch.equal(row_ptr.diff(), mask.sum(1))
            assert row_ptr[0] == 0
            assert torch.equal(index, mask.nonzero()[:, 1])
            assert torch.equal(value.double(), pre[mask])


@pytest.mark.parametrize("shape", SHAPES)
def test_sums(shape: tuple[int, int, int, int], sums: str) -> None:
    batch, d, d_sae, k = shape
    random = Random(shape)
    row_ptr, index, value = random.codes(batch, d_sae, k)
    W, rows, b = random.normal(d_sae, d), random.normal(batch, d), random.normal(d)
    calls = [
        ("decode", (row_ptr, index, value, W)),
        ("entry_dots", (row_ptr, index, rows, W)),
        ("decode_error", (row_ptr, index, value, W, b, rows)),
        ("weight_gradient", (row_ptr, index, value, rows, d_sae)),
        ("feature_sums", (index, value, d_sae)),
    ]
    for name, inputs in calls:
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        rest = [each for each in inputs if not isinstance(each, Tensor)]
        exact = getattr(reference_backend, name)(*double(*tensors), *rest)
        found, torchs = (getattr(each, name)(*inputs) for each in (cpp_backend, torch_backend))
        if isinstance(exact, Tensor):
            exact, found, torchs = (exact,), (found,), (torchs,)
        for each in zip(found, torchs, exact, strict=True):
            assert_as_good(*each)


def test_a_feature_that_is_always_on() -> None:
    """One segment as long as the batch, over two tiles of sources, and most others empty."""
    random, batch, d_sae = Random(0), 5000, 50
    index, row_ptr = torch.full((batch,), 31), torch.arange(batch + 1)
    value, rows = random.normal(batch), random.normal(batch, 20)
    exact = (value.double()[:, None] * rows.double()).sum(0)
    found = cpp_backend.weight_gradient(row_ptr, index, value, rows, d_sae)
    torchs = torch_backend.weight_gradient(row_ptr, index, value, rows, d_sae)
    assert_as_good(found[31], torchs[31], exact)
    assert not found[torch.arange(d_sae) != 31].any()


def test_a_gradient_that_is_written_past_the_caches() -> None:
    random, batch, d, d_sae = Random(1), 6, 64, 65537  # 16 MiB and a row
    row_ptr, index, value = random.codes(batch, d_sae, 300)
    rows = random.integers(batch, d)
    value = value.round()
    found = cpp_backend.weight_gradient(row_ptr, index, value, rows, d_sae)
    assert torch.equal(found, torch_backend.weight_gradient(row_ptr, index, value, rows, d_sae))


def test_no_rows_and_no_entries() -> None:
    W, b, none = torch.ones(6, 4), torch.zeros(6), torch.zeros(0, dtype=torch.int64)
    empty, start = torch.zeros(0, 4), torch.zeros(1, dtype=torch.int64)
    assert [each.shape for each in cpp_backend.topk(empty, W, b, 2)] == [(0, 2), (0, 2)]
    assert [each.shape for each in cpp_backend.topk(torch.ones(3, 4), W, b, 0)] == [(3, 0), (3, 0)]
    assert [each.tolist() for each in cpp_backend.above(empty, W, b, b)] == [[0], [], []]
    assert cpp_backend.decode(start, none, torch.zeros(0), W).shape == (0, 4)
    assert not cpp_backend.weight_gradient(start, none, torch.zeros(0), empty, 6).any()
    nothing = torch.zeros(4, dtype=torch.int64)  # three empty rows
    error, squared, dots = cpp_backend.decode_error(
        nothing, none, torch.zeros(0), W, torch.ones(4), torch.zeros(3, 4)
    )
    assert error.tolist() == [[1.0] * 4] * 3
    assert squared.tolist() == [4.0] * 3
    assert dots.shape == (0,)


def test_strided_tensors(sums: str) -> None:
    random, shape = Random(7), (12, 40, 90)
    batch, d, d_sae = shape
    x, W = random.normal(batch, 2 * d)[:, ::2], random.normal(d, d_sae).T
    b, bars = random.normal(2 * d_sae)[1::2], random.normal(2 * d_sae)[::2]
    row_ptr, index, value = random.codes(batch, d_sae, 6)
    apart = torch.stack([index, index], 1)[:, 0], torch.stack([value, value], 1)[:, 0]
    target, bias = random.normal(d, batch).T, random.normal(2 * d)[::2]
    calls = [
        ("topk", (x, W, b, 5)), ("above", (x, W, b, bars)), ("decode", (row_ptr, *apart, W)),
        ("entry_dots", (row_ptr, apart[0], x, W)),
        ("decode_error", (row_ptr, *apart, W, bias, target)),
        ("weight_gradient", (row_ptr, *apart, x, d_sae)), ("feature_sums", (*apart, d_sae)),
    ]  # fmt: skip
    for name, inputs in calls:
        packed = [each.contiguous() if isinstance(each, Tensor) else each for each in inputs]
        found, expected = getattr(cpp_backend, name)(*inputs), getattr(cpp_backend, name)(*packed)
        for a, c in zip(found, expected, strict=True):
            torch.testing.assert_close(a, c)


@pytest.mark.parametrize("shape", [*SHAPES, (600, 200, 5000, 24), (70, 1, 70, 70)])
def test_threads_make_no_difference(
    shape: tuple[int, int, int, int], sums: str, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp_backend, "_SMALL", 0)
    batch, d, d_sae, k = shape
    random = Random(shape)
    row_ptr, index, value = random.codes(batch, d_sae, k)
    W, rows, b = random.normal(d_sae, d), random.normal(batch, d), random.normal(d)
    x, V = random.integers(batch, d), random.integers(d_sae, d)  # products are exact
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(
            [
                *cpp_backend.topk(x, V, None, k),
                *cpp_backend.above(x, V, None, torch.ones(d_sae)),
                cpp_backend.decode(row_ptr, index, value, W),
                cpp_backend.entry_dots(row_ptr, index, rows, W),
                *cpp_backend.decode_error(row_ptr, index, value, W, b, rows),
                cpp_backend.weight_gradient(row_ptr, index, value, rows, d_sae),
                cpp_backend.feature_sums(index, value, d_sae),
            ]
        )
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.floats(0, 1), st.integers(0, 999)
)
def test_sums_are_each_others_adjoints(
    batch: int, d: int, d_sae: int, fullness: float, seed: int
) -> None:
    """<decode(f), g> = <f, entry_dots(g)> = <W, weight_gradient(f, g)>, exactly, for integers."""
    random = Random(seed)
    row_ptr, index, _ = random.codes(batch, d_sae, int(fullness * d_sae))
    value, W, g = random.integers(len(index)), random.integers(d_sae, d), random.integers(batch, d)
    expected = float((cpp_backend.decode(row_ptr, index, value, W) * g).sum())
    assert float(value @ cpp_backend.entry_dots(row_ptr, index, g, W)) == expected
    assert (
        float((cpp_backend.weight_gradient(row_ptr, index, value, g, d_sae) * W).sum()) == expected
    )
    dense = torch.zeros(batch, d_sae)
    dense[torch.repeat_interleave(torch.arange(batch), row_ptr.diff()), index] = value
    assert torch.equal(cpp_backend.decode(row_ptr, index, value, W), dense @ W)
    assert torch.equal(cpp_backend.feature_sums(index, value, d_sae), dense.sum(0))
    error, squared, dots = cpp_backend.decode_error(row_ptr, index, value, W, g[0], g)
    assert torch.equal(error, dense @ W + g[0] - g)
    assert torch.equal(squared, error.square().sum(1))
    assert torch.equal(dots, cpp_backend.entry_dots(row_ptr, index, error, W))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 600), st.data())
def test_top_of_rows_is_a_top(batch: int, d_sae: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, d_sae))
    random = Random((batch, d_sae, k))
    pre = random.normal(batch, d_sae)
    pre = pre.round() if data.draw(st.booleans()) else pre
    index, value = cpp_backend.topk(torch.eye(batch), pre.T.contiguous(), None, k)
    assert torch.equal(index, chosen(pre, k, signed=False))
    assert torch.equal(value, pre.gather(1, index))
    row_ptr, at, kept = cpp_backend.above(
        torch.eye(batch), pre.T.contiguous(), None, torch.ones(d_sae)
    )
    assert torch.equal(row_ptr.diff(), (pre > 1).sum(1))
    assert torch.equal(kept, pre[pre > 1])
    assert torch.equal(at, (pre > 1).nonzero()[:, 1])


def test_what_is_not_float32_goes_to_torch() -> None:
    random = Random(3)
    row_ptr, index, value = random.codes(9, 30, 4)
    x, W = random.normal(9, 12).double(), random.normal(30, 12).double()
    assert cpp_backend.decode(row_ptr, index, value.double(), W).dtype == torch.float64
    assert cpp_backend.topk(x, W, None, 3)[1].dtype == torch.float64
    assert cpp_backend.weight_gradient(row_ptr, index, value.double(), x, 30).dtype == torch.float64


def test_autocast_does_not_round_products() -> None:
    x, W = Random(4).normal(8, 100), Random(5).normal(50, 100)
    expected = cpp_backend.topk(x, W, None, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = cpp_backend.topk(x, W, None, 5)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("index", {"index": [0, 9]}), ("index", {"index": [-1, 0]}),
        ("row_ptr", {"row_ptr": [0, 2, 1, 2]}), ("row_ptr", {"row_ptr": [0, 1, 1, 3]}),
        ("row_ptr", {"row_ptr": [1, 1, 1, 2]}), ("row_ptr", {"row_ptr": []}),
        ("value", {"value": [1.0]}),
    ],
)  # fmt: skip
def test_codes_that_are_none(where: str, change: dict[str, list[int]]) -> None:
    codes = {"row_ptr": [0, 1, 1, 2], "index": [0, 8], "value": [1.0, 2.0], **change}
    row_ptr, index = (torch.tensor(codes[n], dtype=torch.int64) for n in ("row_ptr", "index"))
    value, W = torch.tensor(codes["value"], dtype=torch.float32), torch.ones(9, 4)
    with pytest.raises(InputError, match=where):
        cpp_backend.decode(row_ptr, index, value, W)
    with pytest.raises(InputError, match=where):
        cpp_backend.weight_gradient(row_ptr, index, value, torch.ones(3, 4), 9)
    with pytest.raises(InputError, match=where):
        cpp_backend.decode_error(row_ptr, index, value, W, torch.ones(4), torch.ones(3, 4))
    if where != "value":
        with pytest.raises(InputError, match=where):
            cpp_backend.entry_dots(row_ptr, index, torch.ones(3, 4), W)


def test_tensors_of_wrong_shape() -> None:
    x, W = torch.ones(2, 3), torch.ones(5, 3)
    with pytest.raises(InputError, match=r"k is out of range .given: 6; allowed: 0 to 5"):
        cpp_backend.topk(x, W, None, 6)
    with pytest.raises(InputError, match="b: wrong shape"):
        cpp_backend.topk(x, W, torch.ones(4), 2)
    with pytest.raises(InputError, match="threshold: wrong shape"):
        cpp_backend.above(x, W, None, torch.ones(1))
    codes = torch.tensor([0, 1, 1]), torch.tensor([0]), torch.ones(1)
    with pytest.raises(InputError, match="target: wrong shape"):
        cpp_backend.decode_error(*codes, W, torch.ones(3), torch.ones(2, 4))
    with pytest.raises(InputError, match="rows: wrong shape"):
        cpp_backend.weight_gradient(*codes, torch.ones(3, 3), 5)
