"""Whether a 16-bit model multiplies in float32 on this CPU, which is often faster.

Few processors multiply 16-bit floats faster than float32, and on the others a forward pass in
bfloat16 takes half as long again. The product of two such numbers fits a float32, and libraries
add them up in float32 and round the sum once; so here: the results are those of the model's own
precision, but for the order of additions.

Which is faster is measured once a machine and number of threads, and kept in the user's cache: a
busy machine would choose now one, now the other, and the last bits of activations with it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from timeit import repeat
from typing import Any, Literal, get_args

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from saescope import compiled
from saescope.cache import remembered

Products = Literal["own", "float32"]
"""in what the products of a model in 16 bits are made; a harvest's manifest says it"""
_SHORT = (torch.bfloat16, torch.float16)
PRODUCT = (1024, 576, 1536)
"""rows, width and outputs of the product that is timed"""
_FEW = 64
"""rows below which turning the weights to float32 costs more than it saves"""
_CLEARLY = 0.87
"""of the time of the model's own products"""
_FASTER = 0.9
"""of float32's time, that bfloat16 must take less than"""


def faster_products(dtype: torch.dtype, device: torch.device) -> Products:
    """The faster for a model of this precision."""
    if device.type != "cpu" or dtype not in _SHORT:
        return "own"
    return _products(dtype, torch.get_num_threads())


def faster_precision() -> str:
    """bfloat16 or float32: which the CPU multiplies faster."""
    return _precision(torch.get_num_threads())


@cache
def _products(dtype: torch.dtype, threads: int) -> Products:
    def measure() -> str:
        own = seconds_of_product(dtype)
        with multiplied_in("float32"):
            other = seconds_of_product(dtype)
        return "float32" if other < _CLEARLY * own else "own"

    kind = str(dtype).removeprefix("torch.")
    return _once(f"products-{kind}", threads, get_args(Products), measure)


@cache
def _precision(threads: int) -> str:
    def measure() -> str:
        short, long = (seconds_of_product(kind) for kind in (torch.bfloat16, torch.float32))
        return "bfloat16" if short < _FASTER * long else "float32"

    return _once("precision", threads, ("bfloat16", "float32"), measure)


def _once(what: str, threads: int, allowed: tuple[str, ...], measure: Callable[[], str]) -> Any:
    capability = torch.backends.cpu.get_cpu_capability()
    machine = compiled.machine(torch.__version__, capability)
    return remembered(f"{what}-{machine}-{threads}", allowed, measure)


def multiplied_in(products: Products) -> AbstractContextManager[object]:
    """Within the context, what is multiplied is multiplied so."""
    return _InFloat32() if products == "float32" else nullcontext()


def seconds_of_product(dtype: torch.dtype) -> float:
    """What a product of a small model's size takes on the CPU."""
    rows, width, out = PRODUCT
    x, w = torch.ones(rows, width, dtype=dtype), torch.ones(out, width, dtype=dtype)
    return min(repeat(lambda: linear(x, w), number=2, repeat=8)) / 2


class _InFloat32(TorchFunctionMode):
    """Linear layers (and GPT-2's, which are addmm) of many rows in 16 bits, in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        named = dict(kwargs or {})
        if func in _OPERANDS:
            rows, operands = _OPERANDS[func]
            named |= zip(operands, args, strict=False)
            args = ()
            if _worth_it(named[rows]):
                given = {name: named[name] for name in operands if named.get(name) is not None}
                wide = {name: x.float() for name, x in given.items()}
                return func(**{**named, **wide}).to(named[rows].dtype)
        return func(*args, **named)


_OPERANDS: dict[Any, tuple[str, tuple[str, ...]]] = {
    linear: ("input", ("input", "weight", "bias")),
    torch.addmm: ("mat1", ("input", "mat1", "mat2")),
}
"""which operand has the rows, and all of them in their order"""


def _worth_it(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _SHORT and x.numel() >= _FEW * x.shape[-1]
