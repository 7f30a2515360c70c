"""Clicks on charts, and stores and models that are not as wanted, in headless Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from dashboards.pages import find_pages
from store import Annotations
from store.database import SCHEMA
from tests.browsing import READY, complaints, heading, settle, visit
from tests.explorer_process import serving
from tests.facts_store import make_facts_store
from tests.older_stores import as_store_schema
from tests.tiny_store import make_tiny_store

pytestmark = [pytest.mark.slow, pytest.mark.browser]

NEWER = SCHEMA + 1


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores named facts, tiny, older (of schema 2) and newer (of a schema that is to come)."""
    root = tmp_path_factory.mktemp("clicks") / "stores"
    make_facts_store(root)
    path = make_tiny_store(root)
    for name in ("older", "newer"):
        shutil.copytree(path.parent, root / name)
    as_store_schema(root / "older" / path.name, 2)
    with duckdb.connect(str(root / "newer" / path.name)) as con:
        con.execute("UPDATE meta SET value = ? WHERE key = 'schema'", [str(NEWER)])
    return root


@pytest.fixture(scope="module")
def server(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(stores, tmp_path_factory.mktemp("log") / "explore.txt") as address:
        yield address


def drawn(page: Any) -> dict[str, float]:
    """The box in which the page's first chart has its points, once it is drawn."""
    ground = page.locator("[data-testid=stPlotlyChart] .nsewdrag").first
    ground.wait_for(state="attached")
    settle(page)
    page.wait_for_timeout(800)
    return ground.bounding_box()


def traceback(page: Any) -> list[str]:
    return page.locator("[data-testid=stException]").all_inner_texts()


@pytest.mark.parametrize(("column", "row", "feature"), [(0, 0, 0), (1, 1, 2), (2, 0, 1)])
def test_a_cell_of_the_heat_map_opens_its_feature(
    page: Any, server: str, column: int, row: int, feature: int
) -> None:
    visit(page, f"{server}/layers?sae=facts")
    box = drawn(page)
    # features 0, 2, 1 by their mean layer; not in a cell's middle
    x = box["x"] + box["width"] * (column + 0.2) / 3
    y = box["y"] + box["height"] * (row + 0.8) / 2
    page.mouse.move(x - 5, y)
    page.mouse.move(x, y)
    page.locator(f".hoverlayer >> text=feature {feature}, layer {row}").first.wait_for()
    page.mouse.click(x, y)
    heading(page, f"Feature {feature} ")
    page.go_back()
    heading(page, "Layers")
    assert not complaints(page)


def test_a_lasso_on_the_map_puts_features_on_a_list(page: Any, server: str, stores: Path) -> None:
    visit(page, f"{server}/map?sae=tiny")
    drawn(page)
    page.get_by_text("Chooses features", exact=True).click()
    box = drawn(page)
    corners = ((0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98), (0.02, 0.03))
    points = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in corners]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=8)
    page.mouse.up()
    page.wait_for_selector("h5:has-text('chosen')")
    settle(page)
    chosen = int(page.locator("h5:has-text('chosen')").inner_text().split(" ")[0])
    assert chosen > 1
    assert "features=" in page.url
    page.get_by_role("combobox", name="List").fill("lassoed")
    page.keyboard.press("Enter")
    settle(page)
    page.get_by_role("button", name="Put on this list").click()
    page.get_by_text("added to lassoed").first.wait_for()
    with Annotations.open(stores / "tiny", sae_hash="5ae") as notes:
        assert len(notes.members("lassoed")) == chosen
    assert not complaints(page)


@pytest.mark.parametrize(
    ("address", "button"),
    [
        ("text?sae=tiny&text=a+b", "Show features"),
        ("steer?sae=tiny&prompt=a&edits=ablate:3", "Continue the prompt"),
    ],
)
def test_an_absent_model_is_said_in_a_sentence(
    page: Any, server: str, address: str, button: str
) -> None:
    visit(page, f"{server}/{address}")
    asked = page.get_by_role("button", name=button)
    if asked.count():  # else what the link asks for was tried at once
        asked.first.click()
    said = page.locator("[data-testid=stAlertContentError]").first
    said.wait_for()
    assert "which model and SAE made it" in said.inner_text()
    assert not traceback(page)


def test_a_store_of_an_older_schema_opens_on_every_page(page: Any, server: str) -> None:
    for url in (found.declared.url for found in find_pages()):
        visit(page, f"{server}/{url}?sae=older{'&other=tiny' * (url == 'compare')}")
        assert "sae=older" in page.url
        # Home also names the store that cannot be read
        said = [each for each in complaints(page) if "newer saescope" not in each]
        assert not said, url
        if url in ("layers", "map"):
            told = page.locator("[data-testid=stAlertContentInfo]").first.inner_text()
            words = " ".join(told.replace("`", "").split())
            assert "--replace" in words
            assert "builds it anew" in words


def test_a_store_of_a_newer_schema_is_a_sentence(page: Any, server: str) -> None:
    for url in ("", "features", "map", "feature", "compare"):
        page.goto(f"{server}/{url}?sae=newer")
        page.locator("[data-testid=stAlertContentError]").first.wait_for()
        settle(page)
        said = " ".join(complaints(page))
        assert f"newer saescope (schema {NEWER}" in said, url
        assert "update saescope" in said
        assert "Traceback" not in page.locator("body").inner_text()
        assert not traceback(page)
    visit(page, f"{server}/?sae=tiny")
    assert page.inner_text(READY) == "Home", "the others are there"
    assert "newer saescope" in page.locator("[data-testid=stAlertContentError]").first.inner_text()
