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
from saescope.__main__ import COMMANDS
from tests.tiny import make_tiny_harvest, make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("saescope", "activations", "sae", "store", "dashboards")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shown_commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith(("saescope", "make"))]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    shown = re.findall(r"(?:`|^|or: )make ([a-z-]+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(shown)
    for target in shown:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(
    "line",
    [line for line in shown_commands() if line.startswith("saescope")]
    + [example for command in COMMANDS.values() for example in command.examples],
)
def test_shown_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file they name is there and every option is known (nothing is run)."""
    monkeypatch.chdir(ROOT)
    _, name, *words = shlex.split(line)
    command = COMMANDS[name]
    cls = getattr(importlib.import_module(command.module), command.config)
    config.parse(cls, words, program=name, description="", positional=command.positional)


def test_every_configuration_file_is_valid() -> None:
    kinds = {"harvest": "harvest", "train": "train", "sweep": "sweep"}
    found = sorted((ROOT / "configs").rglob("*.toml"))
    assert len(found) >= 6
    for path in found:
        command = COMMANDS[kinds[path.parent.name]]
        config.load(getattr(importlib.import_module(command.module), command.config), path)


def test_figures_of_the_demo_are_those_recorded() -> None:
    assert demo_figures.rendered(README) == README, "run python -m benchmarks.demo_figures"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_python_snippet_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's Python, with tiny artefacts in the place of the real ones."""
    from saescope.__main__ import main

    model = make_tiny_model(tmp_path / "model")
    harvest = make_tiny_harvest(tmp_path, model)
    run, out = tmp_path / "run", tmp_path / "stores" / "tiny"
    sizes = ["--sae.d-sae", "256", "--sae.k", "4", "--trainer.batch-size", "64", "--passes", "1"]
    assert main(["train", "--harvest", str(harvest), "--out", str(run), *sizes]) == 0
    assert main(["index", str(run), "--out", str(out)]) == 0
    (snippet,) = blocks("python")
    places = {
        "smollm2-135m": model,
        "data/smollm2-135m-wikipedia": harvest,
        "runs/smollm2-135m-topk": run,
        "stores/smollm2-135m-topk/features.duckdb": out / "features.duckdb",
    }
    for shown, real in places.items():
        assert f'"{shown}"' in snippet, shown
        snippet = snippet.replace(f'"{shown}"', repr(str(real)))
    capsys.readouterr()
    exec(compile(snippet, "README.md", "exec"), {})
    assert "The weather today" in capsys.readouterr().out


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
