"""The Triton programs against dense float64: in the interpreter here, compiled where CUDA is.

The interpreter is chosen when Triton is imported, so a process has either it or CUDA; with
TRITON_INTERPRET=1 set it is the interpreter on any machine.
"""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import kernels
from sae.kernels import adam, reference_backend
from sae.kernels.codes import csr_of
from saescope.errors import InputError

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton", allow_module_level=True)
CUDA = torch.cuda.is_available()
INTERPRETED = not CUDA or os.environ.get("TRITON_INTERPRET") == "1"
assert CUDA or "triton" not in sys.modules, "something imported Triton before this file"
with pytest.MonkeyPatch.context() as patch:
    if INTERPRETED:
        patch.setenv("TRITON_INTERPRET", "1")
    from sae.kernels import triton_adam, triton_decode, triton_gradient, triton_select
    from sae.kernels import triton_backend as backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 2), (3, 33, 65, 9), (2, 24, 50, 50), (3, 530, 30, 1)]
"""(batch, d_in, d_sae, k): odd, k = 1, k = d_sae, more columns than a program has"""
Shape = tuple[int, int, int, int]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda" and (INTERPRETED or not CUDA):
        pytest.skip("the interpreter was asked for" if CUDA else "no CUDA device")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("the programs are compiled here; TRITON_INTERPRET=1 interprets them")
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


class Drawn:
    """A problem of a shape: x, W, b, and codes with empty rows; rounded to a type."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.batch, self.d, self.d_sae, self.k = shape
        self.generator = torch.Generator().manual_seed(sum(shape))
        self.device, self.dtype = device, dtype
        self.x, self.target = (self.normal(self.batch, self.d) for _ in range(2))
        self.W, self.b = self.normal(self.d_sae, self.d), self.normal(self.d_sae)
        self.b_dec = self.normal(self.d)
        share = torch.rand(self.batch, 1, generator=self.generator) * 0.5
        share[0], share[-1] = 0, 1  # an empty row, unless there is no other, and a full one
        mask = torch.rand(self.batch, self.d_sae, generator=self.generator) < share
        self.row_ptr, self.index = (each.to(device) for each in csr_of(mask))
        self.value = self.normal(len(self.index))

    def normal(self, *size: int) -> Tensor:
        """Every second column of a wider matrix: not contiguous."""
        wide = torch.randn(*size[:-1], 2 * size[-1], generator=self.generator)
        return wide.to(self.device, self.dtype)[..., ::2]


def close(found: Tensor, like: Tensor, truth: Tensor) -> None:
    """As near to the truth as torch is at the same precision, or at most twice as far."""
    assert found.dtype == like.dtype
    assert found.shape == truth.shape
    if not truth.numel():
        return
    spacing = torch.finfo(found.dtype).eps * truth.abs().amax()
    allowed = 2 * (like.double() - truth).abs().amax() + spacing
    assert (found.double() - truth).abs().amax() <= allowed


def against_torch(name: str, *given: Tensor | int) -> None:
    """An operation of the backend on these, and torch's dense one, against it in float64."""
    exact = [
        each.double() if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in given
    ]
    found, like, truth = (
        getattr(module, name)(*arguments)
        for module, arguments in (
            (backend, given),
            (reference_backend, given),
            (reference_backend, exact),
        )
    )
    if isinstance(found, Tensor):
        found, like, truth = (found,), (like,), (truth,)
    for each in zip(found, like, truth, strict=True):
        close(*each)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding(shape: Shape, dtype: torch.dtype, device: str) -> None:
    drawn = Drawn(shape, device, dtype)
    codes = (drawn.row_ptr, drawn.index, drawn.value)
    against_torch("decode", *codes, drawn.W)
    against_torch("entry_dots", *codes[:2], drawn.x, drawn.W)
    against_torch("decode_error", *codes, drawn.W, drawn.b_dec, drawn.target)


def test_dots_without_scratch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "_PARTIAL", 0)
    drawn = Drawn((3, 530, 30, 1), device)
    codes = (drawn.row_ptr, drawn.index, drawn.value)
    against_torch("entry_dots", *codes[:2], drawn.x, drawn.W)
    against_torch("decode_error", *codes, drawn.W, drawn.b_dec, drawn.target)


@pytest.mark.parametrize(
    ("dtype", "chunk", "atomic"),
    [
        *((torch.float32, chunk, atomic) for chunk in (1, 4, 128) for atomic in (True, False)),
        (torch.bfloat16, 4, False), (torch.float16, 4, False),
    ],
)  # fmt: skip
def test_weight_gradient(
    dtype: torch.dtype, chunk: int, atomic: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_gradient, "_CHUNK", chunk)
    for shape in ((1, 1, 1, 1), (9, 5, 7, 2), (6, 530, 11, 3)):
        drawn = Drawn(shape, device, dtype)
        given = (drawn.row_ptr, drawn.index, drawn.value, drawn.x, drawn.d_sae)
        found = triton_gradient.sum_by_feature(*given, atomic=atomic)
        exact = (*given[:2], drawn.value.double(), drawn.x.double(), drawn.d_sae)
        close(
            found,
            reference_backend.weight_gradient(*given),
            reference_backend.weight_gradient(*exact),
        )
        if not atomic:
            assert torch.equal(found, triton_gradient.sum_by_feature(*given, atomic=False))
    against_torch("feature_sums", drawn.index, drawn.value, drawn.d_sae)


def test_weight_gradient_without_entries(device: str) -> None:
    row_ptr = torch.zeros(4, dtype=torch.int64, device=device)
    none = torch.zeros(0, device=device)
    found = backend.weight_gradient(row_ptr, none.long(), none, torch.ones(3, 5, device=device), 7)
    assert torch.equal(found, torch.zeros(7, 5, device=device))


@pytest.mark.parametrize("deterministic", [True, False])
def test_order_is_fixed_where_asked(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic algorithms, and low precision, take the programs without atomic additions."""
    asked = []

    def record(*given: object, atomic: bool) -> None:
        asked.append(atomic)

    monkeypatch.setattr(triton_gradient, "sum_by_feature", record)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    none = torch.zeros(0, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.zeros(1, 1, dtype=dtype)
        backend.weight_gradient(none, none, rows, rows, 1)
    assert asked == [not deterministic, False]


def test_sorting_is_shared_only_by_the_same_codes(device: str) -> None:
    index = torch.tensor([2, 0, 1], device=device)
    first = triton_gradient._sort(index)
    assert triton_gradient._sort(index.view(3, 1).view(-1))[0] is first[0]
    index[0] = 0
    assert triton_gradient._sort(index)[0].tolist() == [0, 0, 1]
    assert triton_gradient._sort(index + 1)[0].tolist() == [1, 1, 2]


def check_topk(pre: Tensor, index: Tensor, value: Tensor, *, signed: bool) -> None:
    """That (index, value) are the k largest of pre [batch, d_sae], each once."""
    k = index.shape[1]
    assert torch.equal(pre.gather(1, index), value)
    assert all(len(set(row)) == k for row in index.tolist())
    size = pre.abs() if signed else pre
    expected = size.topk(k).values
    assert torch.equal((value.abs() if signed else value).sort(descending=True).values, expected)


@pytest.mark.parametrize(
    ("dtype", "signed"),
    [(DTYPES[0], False), (DTYPES[0], True), (DTYPES[1], False), (DTYPES[2], True)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_topk(
    shape: Shape, dtype: torch.dtype, signed: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_select, "_CHUNK_ELEMENTS", 2 * shape[2])  # the last chunk is short
    monkeypatch.setattr(triton_select, "_GROUPS", (16, 32))
    drawn = Drawn(shape, device, dtype)
    pre = torch.cat([part for _, part in triton_select._products(drawn.x, drawn.W, drawn.b)])
    index, value = backend.topk(drawn.x, drawn.W, drawn.b, shape[3], signed=signed)
    assert value.dtype == dtype
    check_topk(pre, index, value, signed=signed)


@pytest.mark.parametrize("signed", [False, True])
def test_topk_of_ties_and_extremes(
    signed: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More candidates than there is room for: the whole row is searched."""
    monkeypatch.setattr(triton_select, "_GROUPS", (64, 64))
    columns = torch.arange(300.0)
    rows = [
        (columns >= 100).float(), columns, torch.where(columns < 2, 1e-42, -1e-42),
        torch.where(columns == 270, torch.inf, -torch.inf),
    ]  # fmt: skip
    pre = torch.stack(rows).to(device)
    index = torch.empty(len(pre), 5, dtype=torch.int64, device=device)
    value = torch.empty(len(pre), 5, device=device)
    triton_select._largest(pre, index, value, signed=signed)
    check_topk(pre, index, value, signed=signed)
    assert index[0].sort().values.tolist() == [100, 101, 102, 103, 104]  # of equals, the first


def test_topk_sets_little_aside(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_select, "_GROUPS", (64, 64))
    counts = []

    def launch(program: object, *given: Any, **options: Any) -> None:
        start(program, *given, **options)
        counts.append(given[5])

    start = triton_select.launch
    monkeypatch.setattr(triton_select, "launch", launch)
    drawn = Drawn((2, 5, 500, 4), device)
    backend.topk(drawn.x, drawn.W, drawn.b, 4)
    assert all(4 <= count <= 8 for count in counts[0].tolist())


def test_topk_takes_what_is_no_number(device: str) -> None:
    """As torch's does, so that it is met with later, not lost here."""
    pre = torch.tensor([[0.0, torch.nan, 2.0, torch.inf, 1.0]], device=device)
    index = torch.empty(1, 2, dtype=torch.int64, device=device)
    triton_select._largest(pre, index, torch.empty(1, 2, device=device), signed=False)
    assert sorted(index.flatten().tolist()) == [1, 3]


def test_more_than_there_are(device: str) -> None:
    x = torch.ones(2, 3, device=device)
    with pytest.raises(InputError, match="k exceeds the dictionary"):
        backend.topk(x, torch.ones(4, 3, device=device), None, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_above(
    shape: Shape, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_select, "_CHUNK_ELEMENTS", 2 * shape[2])
    monkeypatch.setattr(triton_select, "_LANES", 64)
    drawn = Drawn(shape, device, dtype)
    pre = torch.cat([part for _, part in triton_select._products(drawn.x, drawn.W, drawn.b)])
    bars = pre[0].float()  # nothing of the first row is above, and equals are not
    row_ptr, index, value = backend.above(drawn.x, drawn.W, drawn.b, bars)
    expected = csr_of(pre > bars)
    assert torch.equal(row_ptr, expected[0])
    assert torch.equal(index, expected[1])
    assert torch.equal(value, pre[pre > bars])


def test_nothing_to_encode(device: str) -> None:
    x, W = torch.ones(0, 3, device=device), torch.ones(4, 3, device=device)
    assert backend.topk(x, W, None, 2)[0].shape == (0, 2)
    row_ptr, index, value = backend.above(x, W, None, torch.zeros(4, device=device))
    assert row_ptr.tolist() == [0]
    assert len(index) == len(value) == 0


def test_products_under_autocast_are_of_low_precision(device: str) -> None:
    drawn = Drawn((3, 5, 7, 2), device)
    with torch.autocast(device, torch.bfloat16):
        _, value = backend.topk(drawn.x, drawn.W, drawn.b, 2)
    assert value.dtype == torch.float32
    assert torch.equal(value, value.bfloat16().float())


def _encode_topk(drawn: Drawn, x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    _, value = kernels.encode_topk(x, W, b, drawn.k)
    return (value.sort(1).values,)


def _encode_above(drawn: Drawn, x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    bars = torch.full((drawn.d_sae,), 0.4, device=x.device)
    return kernels.encode_above(x, W, b, bars)[2:]


def _decode(drawn: Drawn, value: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (kernels.decode(drawn.row_ptr, drawn.index, value, W),)


def _decode_error(
    drawn: Drawn, value: Tensor, W: Tensor, b: Tensor, t: Tensor
) -> tuple[Tensor, ...]:
    return kernels.decode_error(drawn.row_ptr, drawn.index, value, W, b, t)


def weighted(output: Tensor) -> Tensor:
    """A sum in which every element has another weight."""
    numbers = torch.arange(output.numel(), dtype=torch.float64, device=output.device)
    return (output * numbers.cos().to(output.dtype).view_as(output)).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("operation", "names"),
    [
        (_encode_topk, ("x", "W", "b")), (_encode_above, ("x", "W", "b")),
        (_decode, ("value", "W")), (_decode_error, ("value", "W", "b_dec", "target")),
    ],
)  # fmt: skip
def test_both_passes(
    operation: Callable[..., tuple[Tensor, ...]],
    names: tuple[str, ...],
    shape: Shape,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "DENSE", 1.0)  # no dense products, however full the codes
    drawn = Drawn(shape, device)
    results = []
    for name, dtype in (
        ("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64),
    ):  # fmt: skip
        monkeypatch.setenv("SAESCOPE_KERNELS", name)
        given = [getattr(drawn, each).detach().to(dtype).requires_grad_() for each in names]
        assert kernels.backend(given[0]) == name
        outputs = operation(drawn, *given)
        loss = sum(weighted(each) for each in outputs if each.requires_grad)
        assert isinstance(loss, Tensor)
        gradients = torch.autograd.grad(loss, given)
        results.append((*(each.detach() for each in outputs), *gradients))
    for each in zip(*results, strict=True):
        close(*each)


ADAM: dict[str, float] = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "scale": 0.7}


@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 1030), (2, 2100)])
def test_adam(shape: tuple[int, int], dtype: torch.dtype, unit_rows: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    param, grad, m, v = (torch.randn(shape, generator=generator) for _ in range(4))
    if unit_rows:
        param = torch.nn.functional.normalize(param)
    start = [each.to(device, dtype) for each in (param, grad, m, v.square())]
    results, squares = [], []
    for name, kind in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        w, g, *moments = (each.to(kind, copy=True) for each in start)
        with kernels.using(name):
            assert kernels.backend(w) == name
            squares.append(adam.gradient_square(w, g, unit_rows))
            adam.adam_(w, g, *moments, **ADAM, step=3, unit_rows=unit_rows)
        results.append((w, *moments))
    for each in zip(*results, strict=True):
        close(*each)
    allowed = 1e-6 * squares[2] + 2 * (squares[1] - squares[2]).abs()
    assert (squares[0] - squares[2]).abs() <= allowed


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_adam_of_other_layouts(
    shape: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number, and a parameter that is not contiguous."""
    monkeypatch.setattr(triton_adam, "_STRETCH", 4)
    start = torch.ones(shape, device=device)
    start = start.T if shape else start
    results = []
    for name in ("triton", "torch"):
        param, *moments = (each.clone() for each in (start, 0 * start, 0 * start))
        with kernels.using(name):
            adam.adam_(param, 2 * start, *moments, **ADAM, step=1, unit_rows=False)
        results.append((param, *moments))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_chosen_for_what_it_takes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 2, device=device)
    monkeypatch.setenv("SAESCOPE_KERNELS", "triton")
    assert kernels.backend(x) == kernels.backend(x.bfloat16()) == "triton"
    assert kernels.backend(x.double()) == "torch"
    monkeypatch.setenv("SAESCOPE_KERNELS", "auto")
    assert (kernels.backend(x) == "triton") == (device == "cuda")
