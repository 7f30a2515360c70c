"""What the documentation shows is true: commands, options, snippets, links, examples."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import demo_figures
from saescope import config
from saescope.commands import COMMANDS
from tests.docs.pages import parse

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("saescope", "activations", "sae", "store", "dashboards")


@pytest.mark.parametrize(
    "line", [example for command in COMMANDS.values() for example in command.examples]
)
def test_examples_of_help_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file they name is there and every option is known (nothing is run)."""
    monkeypatch.chdir(ROOT)
    parse(shlex.split(line)[1:])


def test_every_configuration_file_is_valid() -> None:
    kinds = {"harvest": "harvest", "train": "train", "sweep": "sweep"}
    found = [path for kind in kinds for path in (ROOT / "configs" / kind).rglob("*.toml")]
    assert len(found) >= 6
    papers = (ROOT / "configs" / "papers").rglob("*.toml")  # tests/unit/test_paper_*.py load these
    assert {*found, *papers} == {*(ROOT / "configs").rglob("*.toml")}
    for path in found:
        command = COMMANDS[kinds[path.parent.name]]
        config.load(getattr(importlib.import_module(command.module), command.config), path)


def test_figures_of_the_demo_are_those_recorded() -> None:
    assert demo_figures.rendered(README) == README, "run python -m benchmarks.demo_figures"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("package", PACKAGES)
def test_docstring_examples(package: str) -> None:
    root = importlib.import_module(package)
    names = [m.name for m in pkgutil.walk_packages(root.__path__, prefix=f"{package}.")]
    for name in [package, *names]:
        if name in ("dashboards.app", "saescope.__main__"):
            continue  # scripts
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        results = doctest.testmod(importlib.import_module(name), optionflags=flags)
        assert results.failed == 0, name


def test_every_public_name_has_a_docstring() -> None:
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", []):
            assert (getattr(module, name).__doc__ or "").strip(), f"{package}.{name}"


def test_the_tutorial_and_the_readme_show_one_run() -> None:
    """Every figure that the tutorial shows of the quick demo is printed by the README's."""
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    outputs = re.findall(r"```text\n(.*?)```", tutorial, re.DOTALL)
    lines = [line for text in outputs for line in text.splitlines() if "done, " in line]
    lines += [line for text in outputs for line in text.splitlines() if re.match(r"  \w.*\d", line)]
    assert len(lines) > 15
    assert [line for line in lines if line not in README and "saescope" not in line] == []
