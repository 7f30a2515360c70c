"""Screened encoding: the exact result of float32 products, whatever the data, screen and threads.

The truth here is `everything`: the float32 product of every row with every feature, as all screens
take it, which is itself held to float64.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import screen
from saescope.errors import InputError

pytestmark = pytest.mark.skipif(not screen.usable("fp32"), reason="no compiler")

SCREENS = [name for name in screen.SCREENS if screen.usable(name)]
Problem = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture(autouse=True)
def _same_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SAESCOPE_SCREEN", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def plain(batch: int, d_in: int, d_sae: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(n, d_in, generator=generator) for n in (batch, d_sae))
    return x, W / d_in**0.5, torch.randn(d_sae, generator=generator) / 4


def outlier_coordinates() -> Problem:
    x, W, b = plain(30, 96, 700)
    x[:, 5] *= 1000
    x[:, 77] += 300
    W[:, 40] *= 1000
    return x, W, b


def outlier_rows() -> Problem:
    x, W, b = plain(30, 64, 700)
    x[3] *= 1e5
    x[4] *= 1e-5
    x[5, 7] = 1e4
    W[9] *= 1e4
    W[10] *= 1e-6
    return x, W, b


def zeros() -> Problem:
    x, W, b = plain(20, 70, 650)
    x[::3] = 0
    W[::5] = 0
    return x, W, b


def zeros_without_bias() -> Problem:
    x, W, _ = zeros()
    return x, W, None  # rows of which all 650 are equal


def constant_rows() -> Problem:
    x, W, b = plain(20, 64, 650)
    x[:] = torch.arange(20.0)[:, None] - 10
    W[7] = 3
    return x, W, b


def huge_bias() -> Problem:
    x, W, b = plain(20, 50, 650)
    return x, W, b * 1e5


def whole_numbers() -> Problem:
    x, W, _ = plain(40, 33, 600)
    return (x * 2).round(), (W * 9).round(), None  # many ties


def twins() -> Problem:
    x, W, b = plain(20, 64, 640)
    W[1::2] = W[::2]
    b[1::2] = b[::2]
    return x, W, b


def near_twins() -> Problem:
    x, W, b = twins()
    W[1::2] *= 1 + 2**-23
    return x, W, b


def correlated() -> Problem:
    x, W, b = plain(40, 128, 2000)
    return x + 3 * x[:1], W + 0.2 * W[:1], b  # rows share a direction, and so do features


def sparse() -> Problem:
    x, W, b = plain(40, 100, 900)
    return x * (x > 1.5), W * (W.abs() > 0.15), b


def no_bias() -> Problem:
    x, W, _ = plain(9, 576, 1500)
    return x, W, None


HARD: list[Callable[[], Problem]] = [
    outlier_coordinates, outlier_rows, zeros, zeros_without_bias, constant_rows, huge_bias,
    whole_numbers, twins, near_twins, correlated, sparse, no_bias,
]  # fmt: skip


def find(name: str, problem: Problem, **what: object) -> screen.Found:
    with screen.using(name):
        found = screen.find(*problem, **what)  # type: ignore[arg-type]
    assert found is not None
    return found


def everything(problem: Problem) -> Tensor:
    """x W^T + b in float32, each sum in the kernels' order, after a look at float64."""
    x, W, b = problem
    found = find("fp32", problem, k=len(W))
    assert torch.equal(found.index, torch.arange(len(W)).expand(len(x), -1))
    truth = x.double() @ W.double().T + (0 if b is None else b.double())
    size = x.double().abs() @ W.double().abs().T + (0 if b is None else b.double().abs())
    assert ((found.value - truth).abs() <= 1e-6 * size).all()
    return found.value


def check_topk(problem: Problem, k: int, *, signed: bool = False) -> None:
    pre = everything(problem)
    ranks = pre.abs() if signed else pre
    kept = ranks.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    for name in SCREENS:
        found = find(name, problem, k=k, signed=signed)
        assert torch.equal(found.index, kept), name
        assert torch.equal(found.value, pre.gather(1, kept)), name


def check_above(problem: Problem, threshold: Tensor) -> None:
    pre = everything(problem)
    mask = pre > threshold
    for name in SCREENS:
        found = find(name, problem, threshold=threshold)
        assert found.row_ptr is not None
        assert torch.equal(found.row_ptr.diff(), mask.sum(1)), name
        assert torch.equal(found.index, mask.nonzero()[:, 1]), name
        assert torch.equal(found.value, pre[mask]), name


@pytest.mark.parametrize("make", HARD)
@pytest.mark.parametrize("signed", [False, True])
def test_topk_of_hard_data(make: Callable[[], Problem], *, signed: bool) -> None:
    for k in (1, 20):
        check_topk(make(), k, signed=signed)


@pytest.mark.parametrize("make", HARD)
def test_above_of_hard_data(make: Callable[[], Problem]) -> None:
    problem = make()
    pre = everything(problem)
    check_above(problem, torch.zeros(len(problem[1])))
    # a value that occurs is the hardest threshold: its own entry is not above it
    check_above(problem, pre[len(pre) // 2].contiguous())
    check_above(problem, pre.quantile(0.98, dim=0))


@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae", "k"),
    [(1, 1, 1, 1), (1, 3, 70, 69), (7, 5, 64, 64), (6, 64, 63, 10), (13, 37, 129, 100),
     (12, 65, 5000, 1), (1, 576, 4097, 64), (25, 127, 1030, 1000), (400, 16, 300, 5)],
)  # fmt: skip
def test_topk_of_odd_shapes(batch: int, d_in: int, d_sae: int, k: int) -> None:
    problem = plain(batch, d_in, d_sae)
    check_topk(problem, k)
    check_topk(problem, k, signed=True)
    check_above(problem, problem[2] + 0.5)


@pytest.mark.parametrize("threads", [1, 2])
def test_more_rows_and_candidates_than_are_done_at_once(threads: int) -> None:
    torch.set_num_threads(threads)
    problem = plain(9000, 20, 300)
    check_topk(problem, 5)
    check_above(problem, torch.full((300,), -1.0))


def test_thresholds_that_are_not_finite() -> None:
    problem = plain(9, 20, 200)
    threshold = torch.full((200,), 0.5)
    threshold[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    check_above(problem, threshold)


def test_rows_with_more_candidates_than_a_list_holds() -> None:
    x, W, b = plain(8, 64, 20_000)
    x[2] = 0
    b[:] = 0  # 20,000 equal pre-activations
    check_topk((x, W, b), 7)
    check_above((x, W, b), torch.full((20_000,), -0.1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_preactivation_exceeds_its_bound(data: st.DataObject) -> None:
    batch, d_in = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 200))
    d_sae, seed = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 2**31))
    x, W, b = plain(batch, d_in, d_sae, seed)
    generator = torch.Generator().manual_seed(seed)
    spread = data.draw(st.sampled_from([0.0, 1.0, 3.0]))
    x = x * torch.exp(spread * torch.randn(d_in, generator=generator))
    W = W * torch.exp(spread * torch.randn(d_sae, 1, generator=generator))
    x = x.round(decimals=data.draw(st.sampled_from([0, 7])))
    signed = data.draw(st.booleans())
    pre = everything((x, W, b)).double()
    truth = x.double() @ W.double().T + b.double()
    size = x.double().norm(dim=1)[:, None] * W.double().norm(dim=1) + b.abs()
    for name in SCREENS:
        with screen.using(name):
            upper = screen.upper_bounds(x, W, b, signed=signed)
        assert upper is not None
        rounding = 4e-7 * size  # what comparisons leave for the float operations of the bound
        for values in (pre, truth):
            assert (upper >= (values.abs() if signed else values) - rounding).all(), name


@pytest.mark.parametrize("name", SCREENS)
def test_bounds_are_tight(name: str) -> None:
    x, W, b = plain(64, 576, 2000)
    x = x * torch.linspace(0.1, 10, 576)
    with screen.using(name):
        upper = screen.upper_bounds(x, W, b)
    assert upper is not None
    slack = (upper - everything((x, W, b))) / (x.norm(dim=1)[:, None] * W.norm(dim=1))
    assert slack.mean() < {"int8": 0.017, "int16": 0.0015, "bf16": 0.007, "fp32": 2e-4}[name]


@pytest.mark.parametrize("name", SCREENS)
def test_candidates_are_few(name: str) -> None:
    problem = plain(64, 576, 8192)
    found = find(name, problem, k=32)
    assert found.candidates < {"int8": 140, "int16": 45, "bf16": 60, "fp32": 40}[name] * 64


@pytest.mark.parametrize("name", SCREENS)
def test_a_bar_that_was_set_too_high_is_found_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = plain(20, 96, 3000)
    before = find(name, problem, k=30)
    monkeypatch.setattr(screen, "_DEVIATIONS", -1e6)
    after = find(name, problem, k=30)
    assert after.candidates > 10 * 3000 > before.candidates  # most rows were done again
    assert torch.equal(before.index, after.index)
    assert torch.equal(before.value, after.value)


@pytest.mark.parametrize("name", SCREENS)
def test_any_number_of_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = plain(500, 72, 1100)
    threshold = torch.full((1100,), 2.0)
    results = []
    for threads, chunk in ((1, 2**23), (2, 2**23), (3, 7 * 1100)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(screen, "_CHUNK_ELEMENTS", chunk)
        results.append((find(name, problem, k=9), find(name, problem, threshold=threshold)))
    for top, over in results[1:]:
        assert torch.equal(top.index, results[0][0].index)
        assert torch.equal(top.value, results[0][0].value)
        for mine, first in zip(over[:3], results[0][1][:3], strict=True):
            assert torch.equal(mine, first)  # type: ignore[arg-type]


def test_rows_do_not_depend_on_those_beside_them() -> None:
    x, W, b = plain(40, 72, 1100)
    whole = find(SCREENS[0], (x, W, b), k=9)
    alone = find(SCREENS[0], (x[17:18], W, b), k=9)
    assert torch.equal(whole.value[17:18], alone.value)


def test_strided_input() -> None:
    x, W, b = plain(20, 60, 400)
    strided = (
        x.T.contiguous().T, torch.stack([W, W], 2)[..., 0], torch.stack([b, b], 1)[:, 0],
    )  # fmt: skip
    for name in SCREENS:
        expected, found = find(name, (x, W, b), k=5), find(name, strided, k=5)
        assert torch.equal(expected.index, found.index)
        assert torch.equal(expected.value, found.value)


@pytest.mark.parametrize("name", SCREENS)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_floats_cannot_hold_is_left_alone(name: str, which: int, value: float) -> None:
    problem = plain(20, 60, 400)
    problem[which].view(-1)[33] = value
    if which == 2 and value == 1e30:
        check_topk(problem, 5)
        return
    with screen.using(name):
        assert screen.topk(*problem, 5) is None
        assert screen.above(*problem, torch.zeros(400)) is None


@pytest.mark.parametrize("name", SCREENS)
def test_what_does_not_fit_is_left_alone(name: str) -> None:
    x, W, b = plain(20, 60, 400)
    with screen.using(name):
        assert screen.topk(x[:0], W, b, 5) is None
        assert screen.topk(x, W[:, 1:], b, 5) is None
        assert screen.topk(x, W, b[1:], 5) is None
        assert screen.above(x, W, b, torch.zeros(1)) is None
        assert screen.topk(torch.ones(1, 2**16 + 1), torch.ones(3, 2**16 + 1), None, 1) is None


def test_auto_screens_what_it_pays_to_screen() -> None:
    x, W, b = plain(256, 64, 2048)
    with screen.keeping(SCREENS[0]):
        found = screen.topk(x, W, b, 8)
        assert found is not None
        assert torch.equal(found[0], find("fp32", (x, W, b), k=8).index)
        assert screen.topk(x[:20], W, b, 8) is None  # rounding W would take longer
        assert screen.topk(x, W, b, 500) is None
        assert screen.above(x, W, b, torch.full((2048,), 2.5)) is not None
    with screen.keeping("none"):
        assert screen.topk(x, W, b, 8) is None


@pytest.mark.parametrize("name", SCREENS)
def test_auto_gives_up_where_candidates_are_many(name: str) -> None:
    x, W, b = plain(256, 64, 2048)
    with screen.keeping(name):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert screen.above(x, W, b, torch.zeros(2048)) is None
    assert find(name, (x, W, b), threshold=torch.zeros(2048)).candidates > 256 * 1000


def test_names() -> None:
    x, W, b = plain(20, 60, 400)
    with pytest.raises(InputError, match="no such screen"), screen.using("int4"):
        pass
    with screen.using("none"):
        assert screen.topk(x, W, b, 5) is None
    with pytest.raises(InputError, match="k must be"), screen.using("fp32"):
        screen.topk(x, W, b, 401)


def test_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = plain(20, 60, 400)
    monkeypatch.setenv("SAESCOPE_SCREEN", "fp32")
    with screen.using("none"):
        assert screen.topk(x, W, b, 5) is not None
    monkeypatch.setenv("SAESCOPE_SCREEN", "fast")
    with pytest.raises(InputError, match="SAESCOPE_SCREEN"):
        screen.topk(x, W, b, 5)
