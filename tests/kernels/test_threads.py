"""The kernels' own pool of threads, for compilers without OpenMP."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sae.kernels import cpp_library
from saescope import compiler


@pytest.mark.parametrize("command", ["g++", "clang++"])
def test_threads_of_our_own(command: str, tmp_path: Path) -> None:
    """All work is done once: by as many as are asked for, for several callers, after a fork."""
    if not shutil.which(command):
        pytest.skip(f"needs {command}")
    program, source = tmp_path / "program", Path(__file__).with_name("threads.cpp")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(
        [command, *flags, "-I", str(cpp_library.FOLDER), str(source), "-o", str(program)],
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "ok\n"


def test_only_gcc_on_linux_is_asked_for_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others link a runtime of their own, which torch's would be beside."""
    gcc = "g++ (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.\n"
    monkeypatch.setattr(compiler.platform, "system", lambda: "Linux")
    assert "-fopenmp" in compiler.thread_flags(gcc)
    assert "-fopenmp" not in compiler.thread_flags("Debian clang version 14.0.6\n")
    monkeypatch.setattr(compiler.platform, "system", lambda: "Darwin")
    assert "-fopenmp" not in compiler.thread_flags(gcc)


@pytest.mark.parametrize(
    ("system", "machine", "flags"),
    [
        ("Linux", "x86_64", ("-march=native",)),
        ("Linux", "aarch64", ("-mcpu=native",)),
        ("Darwin", "arm64", ("-mcpu=apple-m1",)),
        ("Linux", "riscv64", ()),
    ],
)
def test_each_processor_is_named_as_compilers_know_it(
    system: str, machine: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler.platform, "system", lambda: system)
    monkeypatch.setattr(compiler.platform, "machine", lambda: machine)
    assert compiler.native_flags() == flags
