"""What a reader sees of faults: of the explorer's own, of stores, and of a full disk."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from dashboards import failures
from saescope.errors import ArtefactError
from tests.browsing import complaints, settle, visit
from tests.explorer_process import ROOT, serving
from tests.tiny_store import RARE, make_tiny_store

# a page that fails in each way that pages can; added to the explorer's own by the test
FAULTY = """
import streamlit as st
from dashboards.pages import Page

PAGE = Page(title="Faulty", icon="", order=99, url="faulty")

def render():
    st.markdown("## Faulty")
    st.button("In a call", on_click=fail)
    part()
    if st.toggle("In the page"):
        fail()

@st.fragment
def part():
    if st.toggle("In a part"):
        raise OSError(28, "No space left on device")

def fail():
    raise KeyError("<b>the secret of the page</b>")

if __name__ == "__main__":
    render()
"""
ADDED = "import os, dashboards.views\ndashboards.views.__path__.append(os.environ['MORE_VIEWS'])\n"


def said_of(error: Exception) -> str:
    def script(error: Exception) -> None:
        from dashboards import failures

        failures.show(error)

    app = AppTest.from_function(script, kwargs={"error": error}).run()
    assert not app.exception
    return app.error[0].value.replace("\\", "")


def test_each_kind_of_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path))
    log = tmp_path / failures.LOG
    assert said_of(ArtefactError("is *damaged*", where="x.db")) == "x.db: is *damaged*"
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert said_of(OSError(number, "?")).startswith("The disk is full. Free some space")
    assert "End other programs" in said_of(MemoryError())
    assert not log.exists(), "these need no details"
    said = said_of(ZeroDivisionError("of a page"))
    assert "ZeroDivisionError" in said
    assert str(log) in said
    assert "ZeroDivisionError: of a page" in log.read_text()
    log.write_text("x" * 2**21)
    said_of(ZeroDivisionError("again"))
    assert "again" in log.read_text()
    assert len(log.read_text()) < 10_000, "it does not grow for ever"
    monkeypatch.setenv("SAESCOPE_CACHE", "/dev/null/x")
    assert "in the terminal where" in said_of(ZeroDivisionError("with nowhere to write"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good store, and others that cannot be read."""
    folder = make_tiny_store(tmp_path_factory.mktemp("stores")).parent.parent
    for name in ("cut", "foreign"):
        (folder / name).mkdir()
    whole = (folder / "tiny" / "features.duckdb").read_bytes()
    (folder / "cut" / "features.duckdb").write_bytes(whole[: len(whole) // 2])
    (folder / "foreign" / "features.duckdb").write_bytes(b"\x89PNG no store at all" * 999)
    return folder


@pytest.fixture(scope="module")
def server(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    work = tmp_path_factory.mktemp("work")
    for name, text in (("sitecustomize", ADDED), ("faulty", FAULTY)):
        (work / f"{name}.py").write_text(text)
    (work / "views").mkdir()
    shutil.move(work / "faulty.py", work / "views")
    variables = {
        "PYTHONPATH": f"{work}{os.pathsep}{ROOT}",
        "MORE_VIEWS": str(work / "views"),
        "SAESCOPE_CACHE": str(work / "cache"),
    }
    with serving(stores, work / "log.txt", variables=variables) as address:
        said = (work / "log.txt").read_text()
        assert said.count("left out: ") == 2
        yield address


@pytest.mark.slow
@pytest.mark.browser
def test_a_fault_of_a_page_is_a_sentence_and_the_other_pages_go_on(page: Any, server: str) -> None:
    visit(page, f"{server}/faulty")
    for press, said in (
        ("In a call", "This page has a fault (KeyError)"),
        ("In a part", "The disk is full"),
        ("In the page", "This page has a fault (KeyError)"),
    ):
        page.get_by_text(press, exact=True).click()
        page.get_by_text(said).wait_for()
        settle(page)
        assert page.locator("[data-testid=stException]").count() == 0
        assert "secret" not in page.inner_text("body")
        visit(page, f"{server}/faulty")
    page.get_by_text("Features", exact=True).first.click()
    page.locator("[data-testid=stDataFrame]").wait_for()
    assert complaints(page) == []


@pytest.mark.browser
def test_stores_that_cannot_be_read_stand_beside_one_that_can(page: Any, server: str) -> None:
    visit(page, server)
    said = complaints(page)
    assert len(said) == 2
    assert all(name in " ".join(said) for name in ("cut", "foreign"))
    page.goto(f"{server}/feature?sae=cut&feature={RARE}")
    page.locator("[data-testid=stAlertContentError]").wait_for()
    settle(page)
    (said,) = complaints(page)
    assert "cut" in said
    assert page.get_by_role("combobox", name="SAE").count() == 1, "another can be chosen"
