"""Compile the Triton programs to machine code as calls on a GPU would, without a GPU.

    python -m tests.kernels.compile_triton [sm_90 ...]

What the interpreter does not check is checked here: types across branches and loops, arguments that
are 1 (which Triton makes constants), options, registers. Prints a line for each program compiled.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sae.kernels import triton_backend as backend
from sae.kernels import triton_gradient

_launch = JITFunction.run


def _compile(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    del warmup
    kernel = _launch(self, *args, grid=grid, warmup=True, **options)  # compiles, starts nothing
    assert kernel is not None
    size = len(kernel.asm["cubin"])
    print(f"{self.__name__}: {size} bytes for sm_{kernel.metadata.target.arch}")  # noqa: T201


def _call_everything(batch: int, d: int, d_sae: int, k: int, dtype: torch.dtype) -> None:
    x, W = torch.zeros(batch, d, dtype=dtype), torch.zeros(d_sae, d, dtype=dtype)
    b, row_ptr = x.new_zeros(d_sae), torch.arange(batch + 1) * k
    index, value = torch.zeros(batch * k, dtype=torch.int64), x.new_zeros(batch * k)
    for signed in (False, True):
        backend.topk(x, W, b, k, signed=signed)
    backend.above(x, W, b, torch.zeros(d_sae))
    backend.decode(row_ptr, index, value, W)
    backend.entry_dots(row_ptr, index, x, W)
    backend.decode_error(row_ptr, index, value, W, x[0], x)
    for atomic in (False, dtype == torch.float32):
        triton_gradient.sum_by_feature(row_ptr, index, value, x, d_sae, atomic=atomic)
    settings = dict.fromkeys(
        ("beta1", "beta2", "eps", "step_size", "root_correction", "scale"), 0.5
    )
    for unit_rows in (False, True):
        backend.gradient_square(W, W, unit_rows)
        backend.adam_(W, W, W, W, unit_rows, **settings)


def main(architectures: list[str]) -> None:
    """Compile for each of the architectures."""
    JITFunction.run = _compile  # type: ignore[method-assign]
    # sizes that `above` reads back are those of tensors nothing was written to
    torch.empty = torch.zeros  # type: ignore[assignment]
    for name in architectures or ["sm_90"]:
        target = GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
        stand_in: Any = SimpleNamespace(
            get_current_target=lambda target=target: target,
            get_current_device=lambda name=name: name,
            get_current_stream=lambda device: 0,
        )
        driver.set_active(stand_in)
        _call_everything(32, 64, 4096, 16, torch.float32)
        _call_everything(1, 1, 1, 1, torch.bfloat16)


if __name__ == "__main__":
    main(sys.argv[1:])
