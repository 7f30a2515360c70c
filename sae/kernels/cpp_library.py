"""The library of this folder's C++, prebuilt or compiled here, loaded with ctypes.

Compiled by GCC it uses the OpenMP runtime that torch has loaded, hence torch's pool of threads;
otherwise it has threads of its own (`threads.h`).
"""

import ctypes
import functools
import re
from pathlib import Path

import torch
from torch import Tensor

from saescope import compiled

NAME, FOLDER = "kernels", Path(__file__).parent
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[-.]")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None, after one line on standard error that says why."""
    _load_openmp()
    return compiled.load(
        NAME,
        FOLDER,
        what="kernels",
        instead="using torch's operators",
        threads=True,
        identity=torch.__version__,
    )


def build() -> Path:
    """The library's path, compiled if it is not in the cache; NotBuilt if it cannot be."""
    return compiled.build(NAME, FOLDER, threads=True, identity=torch.__version__)


def path() -> Path | None:
    """The file that the compiled kernels come from: in the wheel's `prebuilt`, or in the cache."""
    found = library()
    return None if found is None else Path(found._name)


def machine() -> str:
    """Sixteen letters that stand for this processor and this torch."""
    return compiled.machine(torch.__version__)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a contiguous CPU tensor's data is; a null pointer for None."""
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous(), "kernels take contiguous tensors"
    assert tensor.device.type == "cpu", "C++ kernels take tensors on the CPU"
    return ctypes.c_void_p(tensor.data_ptr())


def _load_openmp() -> None:
    """Make the OpenMP runtime that torch has loaded visible to the library.

    Where there is none, loading the library says which of its functions is missing.
    """
    for path in [*_openmp_runtimes(), "libgomp.so.1"]:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return


def _openmp_runtimes() -> list[str]:
    """Those that are loaded, torch's first; or those in torch's folder, where that is not told."""
    packages = Path(torch.__file__).resolve().parent.parent  # as they are loaded
    mine = (str(packages / "torch"), str(packages / "torch.libs"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
        found = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    else:
        found = {str(path) for folder in mine for path in Path(folder).rglob("lib*omp*")}
    runtimes = [path for path in found if _OPENMP.match(Path(path).name)]
    return sorted(runtimes, key=lambda path: (not path.startswith(mine), path))
