"""Compiling a folder of C++ once, into the user's cache.

A library is kept under the hash of its sources, compiler, flags and processor, with its own
checksum in its name: one that is damaged is built anew, never loaded. CXX names another compiler
than g++ or clang++, SAESCOPE_CXXFLAGS adds flags, SAESCOPE_CACHE names another folder.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from saescope.cache import cache_dir
from saescope.errors import ArtefactError
from saescope.seals import seal_of

SOURCES = ("*.h", "*.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
)
_MORE_FLAGS = "SAESCOPE_CXXFLAGS"


class NotBuilt(Exception):
    """There is no library; the message says why."""


def load(built: Callable[[], Path], what: str, instead: str) -> ctypes.CDLL | None:
    """The library that `built` gives the path of; None, after a line on standard error, without.

    Args:
        what: the library's purpose, for that line.
        instead: what is done without it, for that line.
    """
    try:
        return ctypes.CDLL(str(built()))
    except (NotBuilt, OSError, ArtefactError) as error:
        print(f"saescope: no C++ {what} ({error}); {instead}", file=sys.stderr)  # noqa: T201
        return None


def build(name: str, folder: Path, *, flags: Sequence[str] = (), identity: str = "") -> Path:
    """Path of the library compiled from a folder's sources; compiled now if it is not in the cache.

    Args:
        flags: for the compiler, not the linker; those of the environment come after them.
        identity: anything else that distinguishes one build from another.

    Raises NotBuilt if it cannot be.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or _found_compiler()
    flags = (*FLAGS, *flags, *_more_flags())
    sources = sorted(path for pattern in SOURCES for path in folder.glob(pattern))
    facts = [*flags, *compiler, _version(compiler), platform.machine(), processor(), identity]
    digest = hashlib.sha256("\n".join(facts).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cache, name = cache_dir(), f"{name}-{digest.hexdigest()[:16]}"
    try:
        if (found := _whole(cache, name)) is not None:
            return found
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            built = Path(temporary) / f"{name}.so"
            _compile([*compiler, *flags], [p for p in sources if p.suffix == ".cpp"], built.parent)
            _link([*compiler, "-shared", *_more_flags()], built)
            target = cache / f"{name}-{_checksum(built)}.so"
            built.replace(target)  # whoever is first; the other's is the same
    except OSError as error:
        said = f"{cache}: {error.strerror or error}; SAESCOPE_CACHE may name another folder"
        raise NotBuilt(said) from error
    return target


def _whole(cache: Path, name: str) -> Path | None:
    """The library of this name whose checksum is the one in its file name; others are removed."""
    for path in sorted(cache.glob(f"{name}-*.so")):
        if path.name == f"{name}-{_checksum(path)}.so":
            return path
        print(f"saescope: {path} is damaged and is built anew", file=sys.stderr)  # noqa: T201
        path.unlink(missing_ok=True)
    return None


def _checksum(path: Path) -> str:
    return str(seal_of(path)["crc32c"])


def processor() -> str:
    """The processor's model and features, which decide what -march=native compiles."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    lines = path.read_text(encoding="utf-8").splitlines()
    first = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join(first[name] for name in wanted if name in first)


def _more_flags() -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get(_MORE_FLAGS, "")))


def _found_compiler() -> list[str]:
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NotBuilt("no compiler: neither g++ nor clang++ was found")


def _compile(command: list[str], sources: list[Path], folder: Path) -> None:
    running = [
        subprocess.Popen(
            [*command, "-c", str(source), "-o", str(folder / f"{source.stem}.o")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for source in sources
    ]
    said = [process.communicate()[0] for process in running]
    for process, message in zip(running, said, strict=True):
        if process.returncode:
            raise NotBuilt(f"{command[0]} failed: {_first_error(message)}")


def _link(command: list[str], target: Path) -> None:
    objects = sorted(map(str, target.parent.glob("*.o")))
    linked = subprocess.run([*command, *objects, "-o", str(target)], capture_output=True, text=True)
    if linked.returncode:
        raise NotBuilt(f"{command[0]} failed to link: {_first_error(linked.stderr)}")


def _first_error(said: str) -> str:
    lines = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()
    return lines[0].strip() if lines else "no message"


def _version(compiler: list[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise NotBuilt(f"{compiler[0]}: {error.strerror}") from error
    return done.stdout.partition("\n")[0]
