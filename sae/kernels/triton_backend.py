"""The `triton` backend: Triton programs for CUDA, in the files triton_*.py.

Shapes are those of `sae.kernels.backend`. Sums are taken in float32 whatever the input is. Results
do not depend on the order in which programs run, but for `weight_gradient` and `feature_sums` where
torch is not asked for deterministic algorithms. With TRITON_INTERPRET=1 the programs run as Python,
on CPU tensors.
"""

import importlib
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

NAME = "triton"
DENSE = 1 / 64
"""An entry costs the reading of a decoder row; a matrix product on tensor cores does some hundred
multiplications in that time, but holds the codes as a dense matrix."""
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_WHERE = {
    "above": "select",
    "adam_": "adam",
    "decode": "decode",
    "decode_error": "decode",
    "entry_dots": "decode",
    "gradient_square": "adam",
    "topk": "select",
    "weight_gradient": "gradient",
}
"""which file the other functions are in; Triton is imported when the first is used"""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sae.kernels.triton_{_WHERE[name]}"), name)


def usable() -> bool:
    """Whether Triton is installed, and something that its programs run on is there."""
    return find_spec("triton") is not None and (torch.cuda.is_available() or interpreted())


def interpreted() -> bool:
    """Whether Triton's interpreter runs the programs: to be set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes(device: str, dtype: torch.dtype) -> bool:
    """Whether tensors on this device, of this type, can be given to the programs."""
    return dtype in _TYPES and device == ("cpu" if interpreted() else "cuda") and usable()


def feature_sums(index: Tensor, value: Tensor, d_sae: int) -> Tensor:
    """For each feature the sum of its values."""
    sums = torch.zeros(d_sae, dtype=torch.float32, device=value.device)
    return sums.index_add_(0, index, value.float()).to(value.dtype)
