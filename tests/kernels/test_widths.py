"""The C++ on processors with other vectors: the same sums in the same order, whatever the width."""

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sae.kernels import cpp_library
from saescope import compiled

HARNESS = Path(__file__).parent / "widths.cpp"
ARM, ARM_COMPILER = "qemu-aarch64", "aarch64-linux-gnu-g++"
FUSED, PLAIN = "-march=x86-64-v3", "-march=x86-64-v2"
"""with additions that are fused to products, and without"""


Printed = dict[str, str]
"""what the operations gave, by name"""


def printed(folder: Path, compiler: str, *flags: str, runner: tuple[str, ...] = ()) -> Printed:
    """What the operations give, by name, compiled with these flags."""
    sources = [*sorted(map(str, cpp_library.FOLDER.glob("*.cpp"))), str(HARNESS)]
    own = [flag for flag in compiled.FLAGS if not flag.startswith(("-march", "-fPIC"))]
    warnings = ["-Wno-psabi", "-Wno-unused-function"]
    command = [compiler, *own, *cpp_library.FLAGS, *warnings, *flags, "-static", "-pthread"]
    program = str(folder / "program")
    subprocess.run([*command, "-I", str(cpp_library.FOLDER), *sources, "-o", program], check=True)
    done = subprocess.run([*runner, program], capture_output=True, text=True, check=True)
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
@pytest.mark.skipif(
    not (shutil.which(ARM) and shutil.which(ARM_COMPILER)),
    reason=f"needs {ARM} and {ARM_COMPILER}",
)
def test_on_arm(fused: Printed, tmp_path: Path) -> None:
    arm = printed(tmp_path, ARM_COMPILER, runner=(ARM,))
    assert arm["scores_status"] == "0"
    for name in ("top", "signed", "above", "scores"):
        assert arm[name] == fused[name]
    close(arm, fused)
