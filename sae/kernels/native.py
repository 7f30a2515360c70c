"""Builds the C++ of this folder once, into the user's cache, and loads it with ctypes.

The library is kept under the hash of its sources, compiler, flags and processor. It has no OpenMP
runtime of its own: it uses the one torch has loaded, hence torch's pool of threads. CXX names
another compiler than g++ or clang++, SAESCOPE_CXXFLAGS adds flags to those below.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCES = ("*.h", "*.cpp")
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno",
    "-fvisibility=hidden", "-Wall", "-Wextra",
)  # fmt: skip
FOLDER = Path(__file__).parent
_CACHE = "SAESCOPE_CACHE"
_MORE_FLAGS = "SAESCOPE_CXXFLAGS"
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[-.]")


class NotBuilt(Exception):
    """Why there is no library."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None, after one line on standard error that says why."""
    try:
        _load_openmp()
        return ctypes.CDLL(str(build()))
    except (NotBuilt, OSError) as error:
        print(f"saescope: no C++ kernels ({error}); using torch's operators", file=sys.stderr)  # noqa: T201
        return None


def build() -> Path:
    """The library's path, compiled if it is not in the cache; NotBuilt if it cannot be."""
    compiler = shlex.split(os.environ.get("CXX", "")) or _found_compiler()
    sources = sorted(path for pattern in SOURCES for path in FOLDER.glob(pattern))
    identity = [*_flags(), *compiler, _version(compiler), machine()]
    digest = hashlib.sha256("\n".join(identity).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cache() / f"kernels-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            built = Path(temporary) / target.name
            _compile(compiler, [p for p in sources if p.suffix == ".cpp"], built)
            built.replace(target)  # whoever is first; the other's is the same
    except OSError as error:
        said = f"{target.parent}: {error.strerror or error}; {_CACHE} may name another folder"
        raise NotBuilt(said) from error
    return target


def cache() -> Path:
    """Folder for what is compiled: SAESCOPE_CACHE, or saescope in the user's cache."""
    given = os.environ.get(_CACHE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saescope"


def machine() -> str:
    """Sixteen letters that stand for this processor and this torch."""
    identity = (platform.machine(), _processor(), torch.__version__)
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a contiguous CPU tensor's data is; a null pointer for None."""
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous(), "kernels take contiguous tensors"
    assert tensor.device.type == "cpu", "C++ kernels take tensors on the CPU"
    return ctypes.c_void_p(tensor.data_ptr())


def _flags() -> tuple[str, ...]:
    return FLAGS + _more_flags()


def _more_flags() -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get(_MORE_FLAGS, "")))


def _found_compiler() -> list[str]:
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NotBuilt("no compiler: neither g++ nor clang++ was found")


def _compile(compiler: list[str], sources: list[Path], target: Path) -> None:
    objects: list[Path] = []
    running = []
    for source in sources:
        made = target.parent / f"{source.stem}.o"
        objects.append(made)
        running.append(
            subprocess.Popen(
                [*compiler, *_flags(), "-c", str(source), "-o", str(made)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    said = [process.communicate()[0] for process in running]
    for process, message in zip(running, said, strict=True):
        if process.returncode:
            raise NotBuilt(f"{compiler[0]} failed: {_first_error(message)}")
    # no -fopenmp here: its runtime's symbols are left to the one already loaded
    linked = subprocess.run(
        [*compiler, "-shared", *_more_flags(), *map(str, objects), "-o", str(target)],
        capture_output=True, text=True,
    )  # fmt: skip
    if linked.returncode:
        raise NotBuilt(f"{compiler[0]} failed to link: {_first_error(linked.stderr)}")


def _first_error(said: str) -> str:
    lines = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()
    return lines[0].strip() if lines else "no message"


def _load_openmp() -> None:
    """Make the OpenMP runtime that torch has loaded visible to the library."""
    for path in [*_openmp_runtimes(), "libgomp.so.1"]:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    raise NotBuilt("no OpenMP runtime was found")


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


def _version(compiler: list[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise NotBuilt(f"{compiler[0]}: {error.strerror}") from error
    return done.stdout.partition("\n")[0]


def _processor() -> str:
    """What -march=native looks at."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    lines = path.read_text(encoding="utf-8").splitlines()
    first = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join(first[name] for name in wanted if name in first)
