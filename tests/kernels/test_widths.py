"""The C++ on processors with other vectors, by other compilers, with other threads.

Sums have the same order, whatever the width of vectors and the number of threads.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sae.kernels import cpp_library
from saescope import compiled, compiler

HARNESS = Path(__file__).parent / "widths.cpp"
ARM, ARM_COMPILER = "qemu-aarch64", "aarch64-linux-gnu-g++"
FUSED, PLAIN = "-march=x86-64-v3", "-march=x86-64-v2"
"""with additions that are fused to products, and without"""


Printed = dict[str, str]
"""what the operations gave, by name"""


def printed(
    folder: Path,
    command: str,
    *flags: str,
    openmp: bool = True,
    threads: int = 1,
    runner: tuple[str, ...] = (),
) -> Printed:
    """What the operations give, by name, compiled with these flags."""
    sources = [*sorted(map(str, cpp_library.FOLDER.glob("*.cpp"))), str(HARNESS)]
    own = [flag for flag in compiler.FLAGS if flag != "-fPIC"]
    warnings = ["-Wno-psabi", "-Wno-unused-function"]
    own += ["-fopenmp" if openmp else "-fopenmp-simd", "-pthread"]
    with_flags = [command, *own, *warnings, *flags, "-static"]
    program = str(folder / "program")
    built = [*with_flags, "-I", str(cpp_library.FOLDER), *sources, "-o", program]
    subprocess.run(built, check=True)
    done = subprocess.run(
        [*runner, program, str(threads)], capture_output=True, text=True, check=True
    )
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in done.stdout.splitlines()}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Printed:
    if platform.machine() not in ("x86_64", "AMD64") or not shutil.which("g++"):
        pytest.skip("needs an x86-64 and g++")
    if "avx2" not in compiled.processor().split():
        pytest.skip("needs AVX2")
    return printed(tmp_path_factory.mktemp("fused"), "g++", FUSED)


def close(one: Printed, other: Printed) -> None:
    """Alike but for the last bits of sums; what is chosen is the same."""
    for name in one.keys() & other.keys():
        mine, theirs = (np.array(found[name].split(), dtype=float) for found in (one, other))
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_the_screens_of_any_width_find_what_products_find(fused: Printed) -> None:
    assert fused["integers_status"] == fused["scores_status"] == "0"
    for screen in ("integers", "scores"):
        assert fused[screen] == fused["top"]
        assert fused[f"{screen}_value"] == fused["top_value"]


@pytest.mark.slow
def test_wide_vectors_give_the_same_bits(fused: Printed, tmp_path: Path) -> None:
    if "avx512f" not in compiled.processor().split():
        pytest.skip("needs AVX-512")
    wide = printed(tmp_path, "g++", "-march=native")
    close(wide, fused)
    # dots: whether the columns beyond whole vectors are added in one step with their product is
    # the compiler's
    exact = fused.keys() - {"dots"}
    assert {name: wide[name] for name in exact} == {name: fused[name] for name in exact}


@pytest.mark.slow
def test_narrow_vectors_give_the_same_features(fused: Printed, tmp_path: Path) -> None:
    narrow = printed(tmp_path, "g++", PLAIN)
    assert "integers" not in narrow
    assert narrow["top"] == fused["top"]
    assert narrow["scores_status"] == "0"
    close(narrow, fused)


@pytest.mark.slow
def test_threads_of_our_own_give_the_same_bits(fused: Printed, tmp_path: Path) -> None:
    """Where a compiler has no OpenMP."""
    assert printed(tmp_path, "g++", FUSED, openmp=False, threads=3) == fused


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++")
def test_by_clang(fused: Printed, tmp_path: Path) -> None:
    other = printed(tmp_path, "clang++", FUSED, openmp=False, threads=3)
    close(other, fused)
    exact = fused.keys() - {"dots"}  # as above
    assert {name: other[name] for name in exact} == {name: fused[name] for name in exact}


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(ARM) and shutil.which(ARM_COMPILER)),
    reason=f"needs {ARM} and {ARM_COMPILER}",
)
@pytest.mark.parametrize("openmp", [True, False])
def test_on_arm(openmp: bool, fused: Printed, tmp_path: Path) -> None:
    arm = printed(tmp_path, ARM_COMPILER, openmp=openmp, threads=2, runner=(ARM,))
    assert arm["scores_status"] == "0"
    for name in ("top", "signed", "above", "scores"):
        assert arm[name] == fused[name]
    close(arm, fused)
