"""A wheel's prebuilt kernels, installed where there is no compiler."""

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sae import kernels
from saescope import prebuilt
from tests import wheels
from tests.kernels import installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="its variants are of x86-64"),
    pytest.mark.skipif(not prebuilt.VARIANTS[1].needs <= prebuilt.features(), reason="needs AVX2"),
]
SCRIPT = Path(installed.__file__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.build(tmp_path_factory.mktemp("wheel"), CXX="")


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.install(wheel, tmp_path_factory.mktemp("environment")) / "python"


class Done(NamedTuple):
    """What a run of installed.py did."""

    said: dict[str, Any]
    errors: list[str]
    status: int
    cached: list[str]


def run(python: Path, folder: Path, *, only: frozenset[str] | None = None, **more: str) -> Done:
    """Run it without a compiler, with an empty cache; on a processor that has `only` these."""
    cache = folder / "cache"
    code = "import runpy, sys; from saescope import prebuilt; sys.argv = ['installed.py', 'any']; "
    code += "" if only is None else f"prebuilt.features = lambda: {only!r}; "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    unset = ("CXX", "PYTHONPATH", "VIRTUAL_ENV", "SAESCOPE_KERNELS", "SAESCOPE_CXXFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PATH": str(folder), "SAESCOPE_CACHE": str(cache), **more}
    done = subprocess.run(
        [python, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    cached = [path.name for path in cache.glob("*.so")]
    said = json.loads(done.stdout.splitlines()[-1])
    return Done(said, done.stderr.splitlines(), done.returncode, cached)


def variants_of(said: dict[str, Any]) -> set[str]:
    return {Path(path).name.split("-")[1] for path in said["libraries"]}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[float]]:
    """Of torch's operators, in this process."""
    with kernels.using("torch"):
        return installed.computed()


def test_it_is_for_its_platform_and_any_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")


@pytest.mark.parametrize(
    "variant", [each for each in prebuilt.VARIANTS if each.machine == "x86_64"]
)
def test_without_a_compiler_the_processors_variant_is_used(
    variant: prebuilt.Variant, python: Path, tmp_path: Path, expected: dict[str, list[float]]
) -> None:
    if not variant.needs <= prebuilt.features():
        pytest.skip(f"this processor is not of {variant.name}")
    said, errors, _, cached = run(python, tmp_path, only=variant.needs)
    assert errors == cached == []
    assert variants_of(said) == {variant.name}
    assert all(
        f"site-packages/{each}/prebuilt/" in " ".join(said["libraries"])
        for each in ("sae/kernels", "activations/loading", "store")
    )
    assert said["backend"] == "cpu"
    assert said["runtimes"] == 1, "one OpenMP runtime: torch's"
    assert {name: said[name] for name in expected} == expected


def test_this_processor_is_recognised(python: Path, tmp_path: Path) -> None:
    best = next(each for each in prebuilt.variants() if each.needs <= prebuilt.features())
    assert variants_of(run(python, tmp_path).said) == {best.name}


def test_older_processors_use_torch(
    python: Path, tmp_path: Path, expected: dict[str, list[float]]
) -> None:
    said, errors, _, _ = run(python, tmp_path, only=frozenset())
    assert said["backend"] == "torch"
    assert {name: said[name] for name in expected} == expected
    assert len(errors) == 3  # a line for each library
    assert all("no compiler" in line and "x86_64_v3, x86_64_v4_vnni" in line for line in errors)


def test_a_local_compile_can_be_preferred(python: Path, tmp_path: Path) -> None:
    said, errors, _, cached = run(python, tmp_path, SAESCOPE_PREBUILT="0", PATH=os.environ["PATH"])
    assert errors == []
    assert sorted(Path(path).name for path in said["libraries"]) == sorted(cached)
    assert len(cached) == 3
