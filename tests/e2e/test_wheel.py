"""A wheel built from this tree, installed where there is no checkout, does all that one does."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests import wheels
from tests.e2e.test_demo import STORE, write_tiny_demo
from tests.wheels import PACKAGES, ROOT

ALL_THE_WAY = """
import importlib, pathlib, sys
import activations.models.packaged, dashboards.app, dashboards.demo_command, sae.commands.steer
from saescope.__main__ import main
from saescope.commands import COMMANDS

TINY = ["--model.spec", "model", "--model.dtype", "float32", "--corpus.source", "text/corpus.jsonl",
        "--context", "16", "--sites", "resid_post:1", "--out", "data/plan"]
assert main(["init"]) == 0
assert main(["harvest", "configs/harvest/smollm2-135m-wikipedia.toml", *TINY, "--plan"]) == 0

quick = dashboards.demo_command.QUICK
dashboards.demo_command.examples = lambda: {
    quick.harvest: pathlib.Path("harvest.toml"), quick.train: pathlib.Path("train.toml")}
activations.models.packaged.fetch_all = lambda: None
sae.commands.steer.suggest = lambda store: (3, 2.0, "Number")
assert main(["demo", "--quick"]) == 0

for command in COMMANDS.values():
    importlib.import_module(command.module)
loaded = [m for name, m in sys.modules.items() if name.split(".")[0] in PACKAGES]
for module in loaded:
    assert pathlib.Path(module.__file__).is_relative_to(INSTALLED), module
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is made without a compiler; tests/e2e/test_prebuilt.py has one."""
    return wheels.build(tmp_path_factory.mktemp("wheel"), CXX="", PATH="")


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel."""
    return wheels.install(wheel, tmp_path_factory.mktemp("environment"))


def run(command: list[str | Path], folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {n for n in archive.namelist() if not n.startswith("saescope-")}
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    configs = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.toml")}
    assert inside == files | {f"saescope/{name}" for name in configs}
    assert "store/schema.sql" in inside
    assert "saescope/configs/train/topk.toml" in inside


def test_help_and_missing_files(bin_folder: Path, tmp_path: Path) -> None:
    saescope = bin_folder / "saescope"
    shown = run([saescope, "--help"], tmp_path)
    assert shown.returncode == 0
    assert "explore" in shown.stdout
    missing = run([saescope, "harvest", "configs/harvest/gpt2-small.toml"], tmp_path)
    assert missing.returncode == 2
    assert len(missing.stderr.splitlines()) == 1
    assert "`saescope init .`" in missing.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_all_the_way(bin_folder: Path, tmp_path: Path) -> None:
    """The examples that `init` writes, and the demo with a tiny model: all modules the wheel's."""
    write_tiny_demo(tmp_path)
    (installed,) = bin_folder.parent.glob("lib/python*/site-packages")
    places = f"INSTALLED, PACKAGES = {str(installed)!r}, {PACKAGES!r}\n"
    done = run([bin_folder / "python", "-c", places + ALL_THE_WAY], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "steered (add {3: 3.0}):" in done.stdout
    assert (tmp_path / STORE / "features.duckdb").is_file()
