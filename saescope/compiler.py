"""Running a C++ compiler on a folder. CXX names another compiler than g++ or clang++.

It needs Python's own modules alone: a wheel is built where there are no others.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-ffp-contract=fast",  # GCC's default: clang then gives the same bits
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
)
"""for any processor; `native_flags` are for this one"""
_SOURCES = ("*.h", "*.cpp")


class NotBuilt(Exception):
    """There is no library; the message says why."""


def find() -> list[str]:
    """The compiler's command: CXX, g++ or clang++; NotBuilt if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NotBuilt("no compiler: neither g++ nor clang++ was found")


def version(command: Sequence[str]) -> str:
    """What a compiler says of itself; NotBuilt if it cannot be run."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise NotBuilt(f"{command[0]}: {error.strerror}") from error
    return done.stdout


def thread_flags(said: str) -> tuple[str, ...]:
    """For sources that work on several threads, by what the compiler says of itself.

    GCC's OpenMP leaves its functions to a runtime that is already loaded. Other compilers would
    bring a runtime of their own, if they have one; theirs is the pool of `sae/kernels/threads.h`.
    """
    if "Free Software Foundation" in said and platform.system() == "Linux":
        return ("-fopenmp",)
    return ("-fopenmp-simd", "-pthread")


def native_flags() -> tuple[str, ...]:
    """What has a compiler use all that this processor has; none where compilers do not agree."""
    machine = platform.machine()
    if machine in ("x86_64", "AMD64", "i686"):
        return ("-march=native",)
    if machine == "arm64" and platform.system() == "Darwin":
        return ("-mcpu=apple-m1",)  # the oldest; not every Apple clang knows native
    if machine in ("aarch64", "arm64"):
        return ("-mcpu=native",)
    return ()


def sources(folder: Path) -> list[Path]:
    """The C++ of a folder, in the order of names."""
    return sorted(path for pattern in _SOURCES for path in folder.glob(pattern))


def digest(folder: Path, facts: Sequence[str] = ()) -> str:
    """Sixteen letters that stand for a folder's sources, and for whatever else matters."""
    found = hashlib.sha256("\n".join(facts).encode())
    for path in sources(folder):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def checksum(path: Path) -> str:
    """The crc32 of a file, as eight hexadecimal digits."""
    return f"{zlib.crc32(path.read_bytes()):08x}"


def compile_folder(
    command: Sequence[str], folder: Path, target: Path, linking: Sequence[str] = ()
) -> None:
    """Make a shared library of a folder's sources; NotBuilt with the first error.

    Args:
        command: the compiler and its flags.
        target: the library; its own folder is for objects too, and has no others.
        linking: the compiler and its flags, where the library is linked; otherwise `command`
            without its flags.
    """
    _compile(command, [p for p in sources(folder) if p.suffix == ".cpp"], target.parent)
    linker = [*(linking or command[:1]), "-shared"]
    objects = sorted(map(str, target.parent.glob("*.o")))
    linked = subprocess.run([*linker, *objects, "-o", str(target)], capture_output=True, text=True)
    if linked.returncode:
        raise NotBuilt(f"{linker[0]} failed to link: {_first_error(linked.stderr)}")


def _compile(command: Sequence[str], sources: list[Path], folder: Path) -> None:
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


def _first_error(said: str) -> str:
    lines = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()
    return lines[0].strip() if lines else "no message"
