"""Matrix products of a model in 16 bits on a CPU, made in float32 where that is faster.

Few processors multiply 16-bit floats faster than float32, and on the others a forward pass in
bfloat16 takes half as long again. The product of two such numbers fits a float32, and libraries
add them up in float32 and round the sum once; so here: the results are those of the model's own
precision, but for the order of additions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from timeit import repeat
from typing import Any, Literal

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

Products = Literal["own", "float32"]
"""in what the products of a model in 16 bits are made; a harvest's manifest says it"""
_SHORT = (torch.bfloat16, torch.float16)
_FEW = 64
"""rows below which turning the weights to float32 costs more than it saves"""
_CLEARLY = 0.87
"""of the time of the model's own products"""


def faster_products(dtype: torch.dtype, device: torch.device) -> Products:
    """The faster for a model of this precision, by a short measurement."""
    if device.type != "cpu" or dtype not in _SHORT:
        return "own"
    x, w = torch.ones(1024, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    own = _seconds(lambda: linear(x, w))
    with multiplied_in("float32"):
        other = _seconds(lambda: linear(x, w))
    return "float32" if other < _CLEARLY * own else "own"


def multiplied_in(products: Products) -> AbstractContextManager[object]:
    """Within the context, what is multiplied is multiplied so."""
    return _InFloat32() if products == "float32" else nullcontext()


def _seconds(product: Callable[[], object]) -> float:
    return min(repeat(product, number=2, repeat=8))


class _InFloat32(TorchFunctionMode):
    """Linear layers (and GPT-2's, which are addmm) of many rows in 16 bits, in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        named = dict(kwargs or {})
        if func in _OPERANDS:
            named |= zip(_OPERANDS[func], args, strict=False)
            args = ()
            if _worth_it(named[_LEFT[func]]):
                operands = {name: named[name] for name in _OPERANDS[func] if name in named}
                wide = {name: x if x is None else x.float() for name, x in operands.items()}
                return func(**{**named, **wide}).to(named[_LEFT[func]].dtype)
        return func(*args, **named)


_OPERANDS: dict[Any, tuple[str, ...]] = {
    linear: ("input", "weight", "bias"), torch.addmm: ("input", "mat1", "mat2"),
}  # fmt: skip
_LEFT: dict[Any, str] = {linear: "input", torch.addmm: "mat1"}
"""which operand has the rows"""


def _worth_it(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _SHORT and x.numel() >= _FEW * x.shape[-1]
