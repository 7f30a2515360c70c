"""Every block of code in README.md and docs/ runs, with a tiny model behind the packaged name."""

import shutil
from pathlib import Path

import pytest

from benchmarks import core_metrics, noise_floor
from benchmarks.controls import COLUMNS, page_lines
from sae.bench import rows as results
from sae.evaluation import families
from tests.docs.pages import (
    PAGES,
    ROOT,
    Block,
    blocks,
    check_toml,
    known_as_before,
    make_world,
    run_page,
    use_tiny_packages,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_world(folder, monkeypatch)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(
    page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = blocks(page)
    if not found:
        pytest.skip("has no code")
    folder = tmp_path / "world"
    shutil.copytree(world, folder, symlinks=True)
    use_tiny_packages(folder, monkeypatch)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    with known_as_before():
        run_page(found)


def test_a_reason_is_given_for_what_does_not_run() -> None:
    marks = {str(block): block.mark for page in PAGES for block in blocks(page) if block.mark}
    short = {
        where: mark
        for where, mark in marks.items()
        if mark.startswith("not run:") and len(mark.split()) < 4
    }
    assert short == {}


@pytest.mark.parametrize(
    ("language", "body", "mark"),
    [
        ("bash", "saescope train --no-such-option 3\n", ""),
        ("bash", "saescope train --no-such-option 3\n", "not run: it takes an hour"),
        ("bash", "make no-such-target\n", "not run: it takes an hour"),
        ("bash", "saescope eval runs/nothing\n", ""),
        ("bash", "curl example.org\n", ""),
        ("python", "assert False\n", ""),
        ("toml", "contxt = 3\n", "config: harvest"),
        ("toml", "context = 3\n", ""),
        ("", "saescope train\n", ""),
    ],
)
def test_what_is_wrong_in_a_block_is_found(
    language: str, body: str, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Exception, pytest.fail.Exception)):
        run_page([Block(ROOT / "README.md", 1, language, body, mark)])


def test_pieces_of_configurations_are_checked() -> None:
    check_toml(Block(ROOT / "README.md", 1, "toml", "context = 64\n", "config: harvest"))


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "reference" / "evaluation.md").read_text(encoding="utf-8")
    rows = [
        f"| `{m.name}` | {m.label} | {m.unit} | {m.better} | "
        f"{m.help}{f' ({m.source})' if m.source else ''} |"
        for family in families().values()
        for m in family.metrics
    ]
    table = page.split("<!-- table: saescope.metrics -->")[1].split("<!-- end of table -->")[0]
    assert table.split("|---|---|---|---|---|\n")[1].strip().splitlines() == rows


def test_the_table_of_controls_is_that_of_the_results() -> None:
    page = (ROOT / "docs" / "reference" / "evaluation.md").read_text(encoding="utf-8")
    table = page.split("<!-- table: benchmarks.controls -->")[1].split("<!-- end of table -->")[0]
    path = ROOT / "benchmarks" / "results" / "controls.csv"
    assert table.strip().splitlines() == page_lines(results.read(path, COLUMNS))


def test_the_table_of_noise_floors_is_that_of_the_results() -> None:
    page = (ROOT / "docs" / "reference" / "evaluation.md").read_text(encoding="utf-8")
    table = page.split("<!-- table: benchmarks.noise_floor -->")[1].split("<!-- end of table -->")
    rows = results.read(ROOT / "benchmarks/results/noise_floor.csv", noise_floor.COLUMNS)
    assert table[0].strip().splitlines() == noise_floor.page_lines(rows)


def test_the_table_of_core_metrics_is_that_of_the_results() -> None:
    page = (ROOT / "docs" / "reference" / "evaluation.md").read_text(encoding="utf-8")
    table = page.split("<!-- table: benchmarks.core_metrics -->")[1].split("<!-- end of table -->")
    rows = results.read(ROOT / "benchmarks/results/core_metrics.csv", core_metrics.COLUMNS)
    assert table[0].strip().splitlines() == core_metrics.page_lines(rows)
    for row in rows:  # what a library defines is what it computes
        assert abs(float(row["difference"])) < 1e-3 * max(1, abs(float(row["theirs"])))
