"""No file and no function of the packages is too long to be read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("saescope", "activations", "sae", "store", "dashboards")
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


def files(*suffixes: str) -> Iterator[Path]:
    for package in PACKAGES:
        yield from (p for p in sorted((ROOT / package).rglob("*")) if p.suffix in suffixes)


def test_files_can_be_read_at_once() -> None:
    lengths = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines())
        for p in files(".py", ".cpp", ".h", ".sql")
    }
    assert len(lengths) > 200
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_functions_can_be_read_at_once() -> None:
    found = {}
    for path in files(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                found[f"{path.relative_to(ROOT)}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert len(found) > 1000
    assert {name: n for name, n in found.items() if n > MOST_LINES_OF_A_FUNCTION} == {}


def test_the_formatter_decides_alone() -> None:
    skipping = "fmt: " + "skip"
    assert [str(p.relative_to(ROOT)) for p in files(".py") if skipping in p.read_text()] == []
