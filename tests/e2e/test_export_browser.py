"""Exported HTML pages in a real browser without a network, and the panel that offers them."""

from pathlib import Path
from typing import Any

import pytest

from saescope.__main__ import main
from tests.browsing import visit
from tests.e2e.test_explorer_browser import pytestmark, server, stores
from tests.tiny_store import EVERYWHERE, RARE

__all__ = ["pytestmark", "server", "stores"]  # fixtures, and the mark


@pytest.fixture
def opened(browser: Any) -> Any:
    """A page of a browser without a network; the test fails at any request or console message."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
    page = context.new_page()
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: said.append(request.url))
    yield page
    context.close()
    assert [each for each in said if not each.startswith("file://")] == []


def test_exported_pages_open_offline(stores: Path, tmp_path: Path, opened: Any) -> None:
    words = ["export", str(stores / "tiny"), "--features", f"{RARE},{EVERYWHERE}"]
    assert main([*words, "--out", str(tmp_path / "both.html")]) == 0
    assert main([*words, "--out", str(tmp_path / "pages")]) == 0
    opened.goto((tmp_path / "both.html").as_uri())
    assert opened.locator("h2").all_inner_texts()[0].startswith(f"Feature {RARE}")
    assert opened.locator("section").count() == 2
    assert opened.locator(".ss-text b, .ss-text script").count() == 0, "tokens are no markup"
    assert any("<b>bold</b>" in text for text in opened.locator(".ss-text").all_inner_texts())
    lit = opened.locator(".ss-peak .ss-lit").first
    assert lit.evaluate("e => getComputedStyle(e).backgroundColor").startswith("rgba(235, 122, 28")
    opened.goto((tmp_path / "pages" / "index.html").as_uri())
    opened.get_by_text(f"feature {EVERYWHERE}").click()
    opened.wait_for_url("**/feature-3.html")
    for width in (420, 1920):
        opened.set_viewport_size({"width": width, "height": 800})
        wide = opened.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, "nothing sticks out of the window"


@pytest.mark.slow
def test_the_panel_downloads_and_embeds(page: Any, server: str, tmp_path: Path) -> None:
    visit(page, f"{server}/feature?sae=tiny&feature={RARE}")
    page.get_by_text("Export and embed").click()
    with page.expect_download() as awaited:
        page.get_by_role("button", name="HTML page").click()
    awaited.value.save_as(tmp_path / "feature.html")
    assert f'<h2 id="f{RARE}">' in (tmp_path / "feature.html").read_text()
    shown = page.locator("[data-testid=stCode]").inner_text()
    assert f'<iframe src="{server}/feature?sae=tiny&amp;feature={RARE}&amp;embed=true"' in shown
    visit(page, f"{server}/feature?sae=tiny&feature={RARE}&embed=true")
    assert page.locator("[data-testid=stSidebar]").count() == 0
