"""What people come to the explorer for, from beginning to end, in headless Chromium.

With SAESCOPE_SCREENS=FOLDER each stop is also photographed at 1280 and 1920 pixels, into FOLDER.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch

import sae
from dashboards.pages import find_pages
from sae.architectures.topk import TopKConfig, TopKSAE
from store import Annotations, FeatureFilter, FeatureStore
from tests.browsing import READY, complaints, heading, settle, under_pointer, visit
from tests.explorer_process import serving
from tests.tiny import make_tiny_harvest, make_tiny_model

SCREENS = os.environ.get("SAESCOPE_SCREENS")
WIDTHS = (1280, 1920)
PROMPT = "The river rose in the night"

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a harvest, an SAE and its store, named live."""
    work = tmp_path_factory.mktemp("journeys")
    harvest = make_tiny_harvest(work, make_tiny_model(work / "model"))
    torch.manual_seed(1)
    made = TopKSAE(TopKConfig(d_sae=64, k=6), 32).eval()
    made.metadata = {"site": "blocks.1.hook_resid_post", "harvest": str(harvest)}
    made.save(work / "run")
    sae.index(sae.IndexConfig(run=str(work / "run"), out=str(work / "stores" / "live")))
    return work


@pytest.fixture(scope="module")
def server(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(made / "stores", tmp_path_factory.mktemp("log") / "explore.txt") as address:
        yield address


def done(page: Any) -> None:
    """Wait until the model has been loaded and the page is drawn."""
    page.wait_for_timeout(600)
    page.wait_for_function("!document.querySelector('[data-testid=stSpinner]')")
    settle(page)


def photograph(page: Any, name: str) -> None:
    """A picture at each width, if pictures are asked for."""
    if SCREENS is None:
        return
    Path(SCREENS).mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(700)
        page.screenshot(path=str(Path(SCREENS) / f"{name}_{width}.png"))
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_timeout(300)


def test_find_a_feature_by_word_read_it_label_it_find_it_by_its_label(
    page: Any, server: str, made: Path
) -> None:
    with FeatureStore.open(made / "stores" / "live") as store:
        live = store.features(FeatureFilter(state="live"), limit=64).rows.column("feature")
        tokens = store.top_tokens(live.to_pylist(), 5)
    number, word = next(
        (n, t.strip()) for n, mine in tokens.items() for t in mine if t.strip().isalpha()
    )
    visit(page, server)
    photograph(page, "home")
    page.get_by_text("All features").click()
    heading(page, "Features")
    page.get_by_role("searchbox", name="Search").fill(word)
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/features?*q={word}*")
    settle(page)
    page.locator("[data-testid=stDataFrame]").wait_for()
    page.wait_for_timeout(800)
    photograph(page, "features")
    shown = page.locator("[data-testid=stDataFrame] canvas td[aria-colindex='1']")
    rows = [int(text) for text in shown.all_inner_texts()]
    assert number in rows
    box = page.locator("[data-testid=stDataFrame]").bounding_box()
    page.mouse.click(box["x"] + 60, box["y"] + 35 * (rows.index(number) + 1.5))
    heading(page, f"Feature {number}")
    page.locator(".ss-ex .ss-peak").first.wait_for()
    photograph(page, "feature")
    page.get_by_label("Label", exact=True).fill("quagga crossings")
    page.keyboard.press("Enter")
    heading(page, f"Feature {number} · quagga crossings")
    with Annotations.open(made / "stores" / "live") as notes:
        assert notes.get(number).label == "quagga crossings"
    page.get_by_text("Features", exact=True).first.click()
    heading(page, "Features")
    page.get_by_role("searchbox", name="Search").fill("quagga")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=1 to 1 of 1 feature.")
    settle(page)
    page.wait_for_timeout(800)
    assert [int(text) for text in shown.all_inner_texts()] == [number]


def test_type_a_prompt_click_a_feature_steer_it(page: Any, server: str) -> None:
    visit(page, f"{server}/text?sae=live")
    page.get_by_role("textbox", name="Prompt").fill(PROMPT)
    page.get_by_role("button", name="Show features").click()
    page.locator(".strip .token").first.wait_for()
    done(page)
    assert page.locator(".strip .token").first.get_attribute("class") == "token unread"
    photograph(page, "prompt")
    # hover either way
    name = page.locator(".name").first
    number = name.locator("b").inner_text()
    tokens = "[...e.getRootNode().querySelectorAll('.strip .token')]"
    lit = under_pointer(name, f"e => {tokens}.filter(e => e.style.background).length")
    drawn = page.locator(".row").first.locator(".cell").count()
    assert lit == drawn, "the feature's own tokens are shaded, and no others"
    token = page.locator(".strip .token").nth(3)
    faint, left, right = under_pointer(
        token,
        """e => {
          const root = e.getRootNode(), tip = root.querySelector('.tip').getBoundingClientRect();
          return [root.querySelectorAll('.name.faint').length, tip.left, tip.right];
        }""",
    )
    assert 0 < faint < page.locator(".name").count(), "features that do not fire there are faint"
    assert 0 <= left < right <= 1280
    # click to lock, and the address keeps it
    name.click()
    page.wait_for_url(f"**/text?*locked={number}*")
    done(page)
    token.click()
    page.wait_for_url("**/text?*token=*")
    done(page)
    page.reload()
    page.locator(".name.locked").wait_for()
    assert page.locator(".name.locked b").inner_text() == number
    page.get_by_text(f"Steer with feature {number}").click()
    heading(page, "Steer")
    page.locator("text=Underlined are the steered positions").wait_for()
    done(page)
    assert f"edits=add%3A{number}%3A" in page.url
    texts = page.locator(".ss-big .ss-text").all_inner_texts()
    assert len(texts) == 2
    assert all("river" in text for text in texts)
    assert page.locator(".ss-big").nth(0).locator(".ss-peak").count() == 0
    assert page.locator(".ss-big").nth(1).locator(".ss-peak").count() > 5
    photograph(page, "steer")


def test_two_groups_of_documents_their_difference_a_feature_its_documents(
    page: Any, server: str
) -> None:
    visit(page, f"{server}/diff?sae=live&a=split:train&b=split:held_out")
    frame = page.locator("[data-testid=stDataFrame]").first
    frame.wait_for()
    frame.scroll_into_view_if_needed()
    page.wait_for_timeout(800)
    box = frame.bounding_box()
    page.mouse.click(box["x"] + 15, box["y"] + 35 * 1.5)
    page.wait_for_url("**/diff?*feature=*")
    done(page)
    number = parse_qs(urlsplit(page.url).query)["feature"][0]
    assert f"Feature {number}" in page.locator("[data-testid=stMainBlockContainer]").inner_text()
    assert page.locator("[data-testid=stDataFrame]").count() >= 2, "its documents are listed"
    photograph(page, "diff")
    page.get_by_role("link", name="Open this feature").click()
    heading(page, f"Feature {number}")
    page.locator(".ss-ex").first.wait_for()


def test_every_page_opens_without_an_error(page: Any, server: str) -> None:
    declared = [found.declared for found in find_pages()]
    visit(page, server)
    links = page.locator("[data-testid=stTopNavLink]")
    assert links.count() == len(declared)
    for each in declared:
        visit(page, f"{server}/{each.url}?sae=live")
        done(page)
        assert complaints(page) == [], each.url
        assert page.inner_text(READY).startswith(each.title), each.url
