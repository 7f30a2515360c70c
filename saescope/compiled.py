"""Compiled C++: what a wheel carries, or else compiled once into the user's cache.

A library in the cache is kept under the hash of its sources, compiler, flags and processor, with
its own checksum in its name: one that is damaged is built anew, never loaded. CXX names another
compiler than g++ or clang++, SAESCOPE_CXXFLAGS adds flags; with either, or with
SAESCOPE_PREBUILT=0, what a wheel carries is not used. SAESCOPE_CACHE names another folder.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path

from saescope import compiler, prebuilt
from saescope.cache import cache_dir
from saescope.compiler import NotBuilt
from saescope.errors import ArtefactError, check_choice

_MORE_FLAGS = "SAESCOPE_CXXFLAGS"
_PREBUILT = "SAESCOPE_PREBUILT"


def load(
    name: str,
    folder: Path,
    *,
    what: str,
    instead: str,
    threads: bool = False,
    identity: str = "",
) -> ctypes.CDLL | None:
    """The library of a folder's sources, prebuilt or compiled here.

    Args:
        what: the library's purpose, for a line on standard error if there is none.
        instead: what is done without it, for that line.
        threads, identity: as in `build`.

    None, after that line, where there is none. Raises InputError for a value of SAESCOPE_PREBUILT
    that is not allowed.
    """
    reasons: list[str] = []
    found = _shipped(name, folder, reasons) if _may_be_prebuilt() else None
    if found is not None:
        return found
    try:
        return ctypes.CDLL(str(build(name, folder, threads=threads, identity=identity)))
    except (NotBuilt, OSError, ArtefactError) as error:
        said = "; ".join([str(error), *reasons])
        print(f"saescope: no C++ {what} ({said}); {instead}", file=sys.stderr)  # noqa: T201
        return None


def build(name: str, folder: Path, *, threads: bool = False, identity: str = "") -> Path:
    """Path of the library compiled from a folder's sources; compiled now if it is not in the cache.

    Args:
        threads: whether the sources work on several.
        identity: anything else that distinguishes one build from another.

    Raises NotBuilt if it cannot be.
    """
    command, more = compiler.find(), shlex.split(os.environ.get(_MORE_FLAGS, ""))
    said = compiler.version(command)
    flags = [*compiler.FLAGS, *compiler.native_flags()]
    flags += [*(compiler.thread_flags(said) if threads else ()), *more]
    facts = [*flags, *command, said, platform.machine(), processor(), identity]
    cache, name = cache_dir(), f"{name}-{compiler.digest(folder, facts)}"
    try:
        if (found := _whole(cache, name)) is not None:
            return found
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            built = Path(temporary) / f"{name}.so"
            compiler.compile_folder([*command, *flags], folder, built, [*command, *more])
            target = cache / f"{name}-{compiler.checksum(built)}.so"
            built.replace(target)  # whoever is first; the other's is the same
    except OSError as error:
        said = f"{cache}: {error.strerror or error}; SAESCOPE_CACHE may name another folder"
        raise NotBuilt(said) from error
    return target


def _may_be_prebuilt() -> bool:
    asked = os.environ.get(_PREBUILT) or "1"
    check_choice("is a switch", _PREBUILT, asked, ("0", "1"))
    return asked == "1" and not (os.environ.get("CXX") or os.environ.get(_MORE_FLAGS))


def _shipped(name: str, folder: Path, reasons: list[str]) -> ctypes.CDLL | None:
    """What the wheel carries; None where that cannot be used: why in `reasons`, or said at once."""
    path = None
    try:
        path = prebuilt.find(name, folder)
        return None if path is None else ctypes.CDLL(str(path))
    except NotBuilt as error:
        reasons.append(str(error))
    except OSError as error:
        where = folder / prebuilt.FOLDER if path is None else path
        print(f"saescope: {where} cannot be loaded: {error}", file=sys.stderr)  # noqa: T201
    return None


def _whole(cache: Path, name: str) -> Path | None:
    """The library of this name whose checksum is the one in its file name; others are removed."""
    for path in sorted(cache.glob(f"{name}-*.so")):
        if path.name == f"{name}-{compiler.checksum(path)}.so":
            return path
        print(f"saescope: {path} is damaged and is built anew", file=sys.stderr)  # noqa: T201
        path.unlink(missing_ok=True)
    return None


def processor() -> str:
    """The processor's model and features, which decide what -march=native compiles."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    lines = path.read_text(encoding="utf-8").splitlines()
    first = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join(first[name] for name in wanted if name in first)


def machine(*versions: str) -> str:
    """Sixteen letters that stand for this processor, with versions of what runs on it."""
    identity = (platform.machine(), processor(), *versions)
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
