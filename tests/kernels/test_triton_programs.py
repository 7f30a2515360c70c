"""The Triton programs as a GPU would be given them, and where there is no Triton."""

import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sae.kernels import triton_backend


def in_a_process(*arguments: str, cache: Path) -> str:
    """What Python prints, run without the interpreter of Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_programs_compile_for_a_gpu(tmp_path: Path) -> None:
    output = in_a_process("-m", "tests.kernels.compile_triton", "sm_90", cache=tmp_path)
    compiled = Counter(line.partition(":")[0] for line in output.splitlines())
    assert set(compiled) == {
        "_adam", "_candidates", "_choose", "_count", "_decode", "_decode_error", "_entry_dots",
        "_fill", "_square", "_sum_pieces", "_sum_runs",
    }  # fmt: skip
    assert min(compiled.values()) >= 2, "each for ordinary sizes, and for sizes of 1"


def test_imports_without_triton(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from sae import kernels; from sae.kernels import triton_backend\n"
        "kernels._chosen.append('triton')\n"
        "print(triton_backend.usable(), kernels.backend())"
    )
    assert in_a_process("-c", code, cache=tmp_path) == "False torch"


@pytest.mark.gpu
@pytest.mark.skipif(not triton_backend.takes("cuda", torch.bfloat16), reason="no CUDA device")
def test_more_elements_than_32_bits_count() -> None:
    d_sae, d = 1_000_003, 2304
    W = torch.ones(d_sae, d, dtype=torch.bfloat16, device="cuda")
    row_ptr = torch.tensor([0, 1, 3], device="cuda")
    index = torch.tensor([d_sae - 1, 0, d_sae - 2], device="cuda")
    value = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, device="cuda")
    decoded = triton_backend.decode(row_ptr, index, value, W)
    assert decoded.unique(dim=1).flatten().tolist() == [1.0, 5.0]
    assert triton_backend.entry_dots(row_ptr, index, W[:2], W).tolist() == [d, d, d]
    gradient = triton_backend.weight_gradient(row_ptr, index, value, W[:2], d_sae)
    assert gradient[index, -1].tolist() == [1.0, 2.0, 3.0]
    assert int((gradient != 0).sum()) == 3 * d
