"""What tests of the explorer share, those in a real browser and those without one."""

from collections.abc import Iterator
from typing import Any

import pytest
import streamlit.config

from tests.browsing import CHROMIUM, chromium, has_chromium, watched


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not has_chromium():
        absent = pytest.mark.skip(reason=f"no Chromium at {CHROMIUM}")
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(absent)


@pytest.fixture(autouse=True, scope="session")
def no_magic() -> None:
    """Streamlit runs scripts as the explorer has them run: nothing is drawn that is not asked for.

    Python 3.11 also fails now and then to compile a script with it.
    """
    streamlit.config.set_option("runner.magicEnabled", False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page in a fresh session; the test fails if anything went wrong on it (see `watched`)."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    faults = watched(context)
    opened = context.new_page()
    opened.set_default_timeout(45_000)
    yield opened
    context.close()
    assert faults == []
