"""Wheels of this tree, and environments that have one installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("saescope", "activations", "sae", "store", "dashboards")
_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def build(folder: Path, **variables: str) -> Path:
    """The wheel of a copy of this tree, in which nothing built before is left.

    Args:
        folder: an empty one, for the copy and the wheel.
        variables: of the environment.
    """
    source, out = folder / "source", folder / "wheel"
    for name in (*PACKAGES, "configs"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in _FILES:
        shutil.copy(ROOT / name, source)
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", out)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, source],
        check=True,
        env={**os.environ, **variables},
    )
    (built,) = out.iterdir()
    return built


def install(wheel: Path, home: Path) -> Path:
    """The folder of programs of a new environment with the wheel and the packages that it needs.

    This environment's packages come as a folder on the path, so that what an editable install has
    put there for Python's start does not run.
    """
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-index")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], check=True
    )
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent
