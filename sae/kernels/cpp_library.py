"""The library of this folder's C++, loaded with ctypes.

It has no OpenMP runtime of its own: it uses the one torch has loaded, hence torch's pool of
threads.
"""

import ctypes
import functools
import hashlib
import platform
import re
from pathlib import Path

import torch
from torch import Tensor

from saescope import compiled

FOLDER = Path(__file__).parent
FLAGS = ("-fopenmp",)
"""for the compiler alone: its runtime's symbols are left to the one already loaded"""
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[-.]")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None, after one line on standard error that says why."""

    def built() -> Path:
        _load_openmp()
        return build()

    return compiled.load(built, "kernels", "using torch's operators")


def build() -> Path:
    """The library's path, compiled if it is not in the cache; NotBuilt if it cannot be."""
    return compiled.build("kernels", FOLDER, flags=FLAGS, identity=torch.__version__)


def machine() -> str:
    """Sixteen letters that stand for this processor and this torch."""
    identity = (platform.machine(), compiled.processor(), torch.__version__)
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a contiguous CPU tensor's data is; a null pointer for None."""
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous(), "kernels take contiguous tensors"
    assert tensor.device.type == "cpu", "C++ kernels take tensors on the CPU"
    return ctypes.c_void_p(tensor.data_ptr())


def _load_openmp() -> None:
    """Make the OpenMP runtime that torch has loaded visible to the library."""
    for path in [*_openmp_runtimes(), "libgomp.so.1"]:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    raise compiled.NotBuilt("no OpenMP runtime was found")


def _openmp_runtimes() -> list[str]:
    """Those that are loaded, torch's first; or those in torch's folder, where that is not told."""
    packages = Path(torch.__file__).parent.parent
    mine = (str(packages / "torch"), str(packages / "torch.libs"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
        found = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    else:
        found = {str(path) for folder in mine for path in Path(folder).rglob("lib*omp*")}
    runtimes = [path for path in found if _OPENMP.match(Path(path).name)]
    return sorted(runtimes, key=lambda path: (not path.startswith(mine), path))
