"""Building and loading the C++: what the cache holds, and what happens where it cannot be built."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from activations.loading import gather
from sae import kernels
from sae.kernels import cpp_backend, cpp_library
from saescope import compiled, compiler

with_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler",
)
_SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return %d; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small source, built into an empty cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(_SOURCE % 41)
    monkeypatch.setattr(cpp_library, "FOLDER", folder)
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "cache"))
    return folder


def load(capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The library as a new process would get it, and what it says on standard error."""
    found = cpp_library.library.__wrapped__()
    return found, capsys.readouterr().err


@with_compiler
def test_a_library_is_built_once(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, said = load(capsys)
    assert found.answer() == 41  # type: ignore[attr-defined]
    assert said == ""
    path = cpp_library.build()
    written = path.stat().st_mtime_ns
    assert cpp_library.build() == path
    assert path.stat().st_mtime_ns == written
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # nothing left lying


@with_compiler
def test_whatever_matters_makes_another_library(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [cpp_library.build()]
    (sources / "answer.cpp").write_text(_SOURCE % 42)
    paths.append(cpp_library.build())
    (sources / "more.h").write_text("// included by none\n")
    paths.append(cpp_library.build())
    monkeypatch.setenv("SAESCOPE_CXXFLAGS", "-DANSWER=43")
    paths.append(cpp_library.build())
    monkeypatch.setattr(compiled, "processor", lambda: "another")
    paths.append(cpp_library.build())
    monkeypatch.setattr(compiler, "version", lambda _: "another")
    paths.append(cpp_library.build())
    assert len(set(paths)) == len(paths)
    assert all(path.exists() for path in paths)


@with_compiler
def test_two_processes_build_at_once(sources: Path) -> None:
    code = (
        "from pathlib import Path; from sae.kernels import cpp_library; "
        f"cpp_library.FOLDER = Path({str(sources)!r}); print(cpp_library.library().answer())"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate() for process in running]
    assert said == [("41\n", "")] * 2
    assert len(list((sources.parent / "cache").iterdir())) == 1


def test_without_a_compiler(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(sources))
    assert load(capsys) == (
        None,
        "saescope: no C++ kernels (no compiler: neither g++ nor clang++ was found); "
        "using torch's operators\n",
    )


def test_a_compiler_that_is_not_there(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    found, said = load(capsys)
    assert found is None
    assert said.count("\n") == 1
    assert "(no-such-compiler: No such file or directory)" in said


@with_compiler
def test_source_that_does_not_compile(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sources / "broken.cpp").write_text("int f() { return; }\n" * 5)
    found, said = load(capsys)
    assert found is None
    assert said.count("\n") == 1
    assert "broken.cpp:1" in said
    assert "error" in said
    assert not list((sources.parent / "cache").iterdir())


@with_compiler
def test_a_symbol_that_is_not_there(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sources / "answer.cpp").write_text(
        f"int nowhere();\n{_SOURCE % 0}".replace("0;", "nowhere();")
    )
    found, said = load(capsys)
    assert found is None
    assert said.count("\n") == 1
    assert "undefined symbol" in said


def test_a_cache_that_cannot_be_written(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiler, "version", lambda _: "any")
    monkeypatch.setenv("CXX", "any")
    monkeypatch.setenv("SAESCOPE_CACHE", str(sources / "answer.cpp" / "below a file"))
    found, said = load(capsys)
    assert found is None
    assert said.count("\n") == 1
    assert "Not a directory; SAESCOPE_CACHE may name another folder" in said


def test_without_the_library_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_library, "library", lambda: None)
    for asked in ("auto", "cpu"):
        monkeypatch.setenv("SAESCOPE_KERNELS", asked)
        assert kernels.backend(torch.ones(1)) == "torch"
    index, value = kernels.encode_topk(torch.ones(1, 2), torch.eye(3, 2), None, 2)
    assert sorted(index.tolist()[0]) == [0, 1]
    assert value.tolist() == [[1.0, 1.0]]


def test_a_process_without_a_compiler_says_so_once(tmp_path: Path) -> None:
    code = (
        "import torch; from sae import kernels\n"
        "for _ in range(2): kernels.encode_topk(torch.ones(1, 2), torch.eye(3, 2), None, 2)\n"
        "print(kernels.backend())"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "SAESCOPE_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**environment, "PATH": str(tmp_path), "SAESCOPE_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == "torch\n"
    assert done.stderr.count("\n") == 1
    assert "no compiler" in done.stderr


@pytest.mark.slow
@with_compiler
@pytest.mark.parametrize("target", ["native", "baseline"])
@pytest.mark.parametrize("folder", [cpp_library.FOLDER, Path(gather.__file__).parent])
def test_it_builds_without_warnings(target: str, folder: Path, tmp_path: Path) -> None:
    """For this processor, and without the vectors of newer ones."""
    if target == "baseline" and platform.machine() != "x86_64":
        pytest.skip("the baseline is named for x86-64 only")
    own = ["-march=x86-64"] if target == "baseline" else compiler.native_flags()
    command = compiler.find()
    command += [*compiler.thread_flags(compiler.version(command)), *compiler.FLAGS, "-Werror", *own]
    running = [
        subprocess.Popen(
            [*command, "-c", str(source), "-o", str(tmp_path / source.stem)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for source in sorted(folder.glob("*.cpp"))
    ]  # fmt: skip
    assert running
    assert "".join(process.communicate()[0] for process in running) == ""
    assert not any(process.returncode for process in running)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is loaded")
@pytest.mark.skipif(not cpp_backend.usable(), reason="no C++ compiler")
def test_it_shares_torchs_threads() -> None:
    """One OpenMP runtime in the process, and no threads beyond those torch has made."""
    if "-fopenmp" not in compiler.thread_flags(compiler.version(compiler.find())):
        pytest.skip("compiled by this compiler it has threads of its own")
    code = """
import os, torch
from sae.kernels import cpp_backend, cpp_library
torch.set_num_threads(3)
x, W = torch.ones(64, 512), torch.ones(4096, 512)
(x @ W.T).exp().sum()
before = len(os.listdir("/proc/self/task"))
cpp_backend.topk(x, W, None, 3)
torch.ones(10**6).exp()
row_ptr, index, value = torch.arange(65), torch.arange(64), torch.ones(64)
cpp_backend.weight_gradient(row_ptr, index, value, x, 4096)
print(len(cpp_library._openmp_runtimes()), len(os.listdir("/proc/self/task")) - before)
"""
    environment = {**os.environ, "SAESCOPE_SCREEN": "none"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ["1", "0"]
