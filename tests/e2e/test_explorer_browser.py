"""The explorer in a real browser: served by `saescope explore`, driven in headless Chromium."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dashboards.pages import find_pages
from store import Annotations, FeatureFilter, FeatureStore
from tests.browsing import READY, heading, settle, under_pointer, visit
from tests.explorer_process import serving
from tests.tiny_store import D_SAE, EVERYWHERE, RARE, make_tiny_store

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("stores")).parent.parent


@pytest.fixture(scope="module")
def server(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The explorer's address; the server is `saescope explore`, ended by Ctrl-C."""
    with serving(stores, tmp_path_factory.mktemp("log") / "explore.txt") as address:
        yield address


def test_overview_and_navigation(page: Any, server: str) -> None:
    visit(page, server)
    assert page.inner_text(READY) == "Home"
    assert "sae=tiny" in page.url
    assert "never fired" in page.locator(".ss-measured").inner_text()
    page.wait_for_selector("[data-testid=stPlotlyChart] .bars path", state="attached")
    page.get_by_text("Prompt", exact=True).first.click()
    heading(page, "Prompt")
    page.get_by_text("Features", exact=True).first.click()
    heading(page, "Features")
    assert "sae=tiny" in page.url


def test_the_first_page_has_an_address_of_its_own(page: Any, server: str) -> None:
    visit(page, f"{server}/overview?sae=nothing")
    assert page.inner_text(READY) == "Home"
    assert "'nothing'" in page.locator("[data-testid=stAlertContentWarning]").inner_text()
    page.wait_for_url(f"{server}/?sae=tiny")
    assert page.locator("[role=dialog]").count() == 0, "the page is there"
    links = page.locator("[data-testid=stTopNavLink]").all_inner_texts()
    assert [text.split("\n")[-1] for text in links].count("Home") == 1


@pytest.mark.slow
def test_the_navigation_shows_every_page(page: Any, server: str) -> None:
    titles = [found.declared.title for found in find_pages()]
    for width in (1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        visit(page, server)
        links = page.locator("[data-testid=stTopNavLink]")
        assert [text.split("\n")[-1] for text in links.all_inner_texts()] == titles
        boxes = [link.bounding_box() for link in links.all()]
        ends = [box["x"] + box["width"] for box in boxes]
        # those that do not fit would be one upon the other, behind "2 more"
        pairs = zip(ends[:-1], boxes[1:], strict=True)
        assert all(end <= box["x"] for end, box in pairs), width
        assert ends[-1] <= width
    page.set_viewport_size({"width": 400, "height": 860})
    visit(page, server)
    page.locator("[data-testid=stExpandSidebarButton]").click()
    links = page.locator("[data-testid=stSidebarNavLink]")
    links.last.wait_for()
    assert [text.split("\n")[-1] for text in links.all_inner_texts()] == titles


def test_deep_link_and_tokens(page: Any, server: str) -> None:
    visit(page, f"{server}/feature?sae=tiny&feature={RARE}")
    assert page.inner_text(READY) == f"Feature {RARE} · →", "it has no label, but a token"
    peak = page.locator(".ss-ex .ss-peak")
    peak.wait_for()
    assert peak.count() == 1
    tip = under_pointer(peak, "e => getComputedStyle(e, '::after').content")
    assert "activation 1.500" in tip
    assert "sequence 2, position 5" in tip
    assert "Title <" in tip
    lit = page.locator(".ss-peak .ss-lit")
    assert lit.evaluate("e => getComputedStyle(e).backgroundColor").startswith("rgba(235, 122, 28")


def test_tokens_never_become_markup(page: Any, server: str) -> None:
    visit(page, f"{server}/feature?sae=tiny&feature={EVERYWHERE}")
    page.wait_for_selector(".ss-ex")
    text = page.locator(".ss-text").all_inner_texts()
    assert any("<b>bold</b>" in part for part in text)
    assert any("*star*" in part for part in text)
    assert any("[U+202E]drawkcab" in part for part in text)
    assert page.locator(".ss-text b").count() == 0
    assert page.locator(".ss-text >> text=↵").count() > 0


@pytest.mark.slow
def test_wrong_addresses(page: Any, server: str, stores: Path) -> None:
    for query, number in (
        ("feature=abc", 0),
        ("feature=1000000000", D_SAE - 1),
        ("sae=../../etc&feature=5", 5),
        ("sae=%3Cimg%20src=x%20onerror=alert(1)%3E&feature=5", 5),
    ):
        visit(page, f"{server}/feature?{query}")
        assert page.inner_text(READY).startswith(f"Feature {number} · ")
        assert page.locator("[data-testid=stAlertContentWarning]").count() == 1
        page.wait_for_url(f"**/feature?*feature={number}*")
        assert "sae=tiny" in page.url
        assert page.locator("img[src=x]").count() == 0


def test_next_neighbour_and_back(page: Any, server: str) -> None:
    visit(page, f"{server}/feature?sae=tiny&feature=5")
    page.locator(".ss-ex").first.wait_for()
    settle(page)
    page.keyboard.press("n")
    heading(page, "Feature 6")
    assert "feature=6" in page.url
    page.locator(".st-key-relatives [data-testid=stPageLink] a").first.click()
    page.wait_for_function(f"document.querySelector('{READY}').innerText.split(' ')[1] != '6'")
    settle(page)
    assert page.inner_text(READY).startswith("Feature 7 "), "the nearest direction of 6 is 7"
    page.go_back()
    heading(page, "Feature 6")


def test_a_row_of_the_table_opens_its_feature(page: Any, server: str) -> None:
    visit(page, f"{server}/features?sae=tiny")
    frame = page.locator("[data-testid=stDataFrame]")
    frame.wait_for()
    page.wait_for_timeout(800)
    box = frame.bounding_box()
    page.mouse.click(box["x"] + 300, box["y"] + 35 * 3.5)
    heading(page, "Feature 2")
    assert "feature=2" in page.url


def test_on_a_phone_the_table_comes_first_and_the_filters_are_folded(
    page: Any, server: str
) -> None:
    page.set_viewport_size({"width": 400, "height": 860})
    visit(page, f"{server}/features?sae=tiny")
    frame = page.locator("[data-testid=stDataFrame]")
    frame.wait_for()
    assert frame.bounding_box()["y"] < 500, "more than a third of the screen is the table's"
    fold = page.locator(".st-key-table_fold")
    fold.get_by_text("Filters and order").click()
    settle(page)
    fold.get_by_text("Dead", exact=True).click()
    settle(page)
    assert "1 filter set" in fold.inner_text()
    assert fold.get_by_text("Dead", exact=True).is_visible(), "it stays open"


def first_features(page: Any) -> list[int]:
    cells = page.locator("[data-testid=stDataFrame] canvas td[aria-colindex='1']")
    return [int(text) for text in cells.all_inner_texts()[:3]]


def test_the_head_of_a_column_sorts_all_features(page: Any, server: str, stores: Path) -> None:
    with FeatureStore.open(stores / "tiny") as features:
        live = FeatureFilter(state="live")
        wanted = {
            down: features.features(live, sort="density", descending=down, limit=3)
            .rows.column("feature")
            .to_pylist()
            for down in (False, True)
        }
    visit(page, f"{server}/features?sae=tiny")
    frame = page.locator("[data-testid=stDataFrame]")
    frame.wait_for()
    page.wait_for_timeout(800)
    for down in (False, True):
        box = frame.bounding_box()
        page.mouse.click(box["x"] + 800, box["y"] + 17)  # the head of density
        settle(page)
        for _ in range(40):  # the canvas is drawn after the page
            if first_features(page) == wanted[down]:
                break
            page.wait_for_timeout(250)
        assert page.inner_text(READY) == "Features"
        assert first_features(page) == wanted[down]
    box = frame.bounding_box()
    page.mouse.click(box["x"] + 60, box["y"] + 35 + 17)
    heading(page, f"Feature {wanted[True][0]}")


def test_window_size_and_intervals(page: Any, server: str) -> None:
    visit(page, f"{server}/feature?sae=tiny&feature={EVERYWHERE}")
    page.wait_for_selector(".ss-ex")
    assert page.locator(".ss-ex").count() == 20
    page.get_by_text("By interval", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.ss-ex').length == 25")


def test_a_label_is_saved_and_found(page: Any, server: str, stores: Path) -> None:
    visit(page, f"{server}/feature?sae=tiny&feature=20")
    page.get_by_label("Label", exact=True).fill("zebra <words>")
    page.keyboard.press("Enter")
    heading(page, "Feature 20 · zebra <words>")
    with Annotations.open(stores / "tiny") as notes:
        assert notes.get(20).label == "zebra <words>"
    page.get_by_text("Features", exact=True).first.click()
    heading(page, "Features")
    page.get_by_role("searchbox", name="Search").fill("zebr")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=1 to 1 of 1 feature.")


@pytest.mark.slow
def test_dark_and_light_are_legible(browser: Any, server: str) -> None:
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        visit(page, f"{server}/feature?sae=tiny&feature={EVERYWHERE}")
        page.wait_for_selector(".ss-lit")
        colours = page.evaluate(
            """() => {
              const numbers = c => c.match(/[\\d.]+/g).map(Number);
              const base = numbers(getComputedStyle(document.querySelector('.stApp'))
                .backgroundColor);
              return [...document.querySelectorAll('.ss-lit')].map(e => {
                const style = getComputedStyle(e);
                const shade = numbers(style.backgroundColor), alpha = shade[3] ?? 1;
                return [numbers(style.color).slice(0, 3),
                        base.slice(0, 3).map((b, i) => b * (1 - alpha) + shade[i] * alpha)];
              });
            }"""
        )
        assert min(contrast(text, back) for text, back in colours) >= 4.5, scheme
        context.close()


def contrast(first: list[float], second: list[float]) -> float:
    """The contrast ratio of two colours as WCAG 2 defines it; 4.5 is enough for text."""

    def luminance(colour: list[float]) -> float:
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.slow
def test_two_sessions_at_once(browser: Any, server: str, stores: Path) -> None:
    contexts = [browser.new_context() for _ in range(3)]
    pages = [context.new_page() for context in contexts]
    for number, page in enumerate(pages):
        page.goto(f"{server}/feature?sae=tiny&feature={number}")
    with FeatureStore.open(stores / "tiny") as features:
        for number, page in enumerate(pages):
            page.wait_for_selector(".ss-ex")
            strongest = features.feature(number).max
            assert page.locator(".ss-act").first.inner_text() == f"{strongest:.2f}"
    for context in contexts:
        context.close()


def test_a_taken_port_is_one_clear_line(server: str, stores: Path) -> None:
    port = server.rsplit(":", 1)[1]
    done = subprocess.run(
        [sys.executable, "-m", "saescope", "explore", str(stores), "--port", port],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2
    assert "taken by another program" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_nothing_is_asked_of_other_machines(page: Any, server: str) -> None:
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(request.url))
    for path in ("", "features", "feature", "text", "steer"):
        visit(page, f"{server}/{path}?sae=tiny")
        page.mouse.wheel(0, 2000)
        settle(page)
    own = (server, server.replace("http", "ws"), "data:", "blob:")
    assert {url for url in asked if not url.startswith(own)} == set()
    icon = page.evaluate("document.querySelector('link[rel*=icon]').href")
    assert icon.startswith("data:image/svg"), "the page brings its icon along"


def number_shown(page: Any) -> int:
    return int(page.inner_text(READY).split()[1])


@pytest.mark.slow
def test_a_label_is_saved_for_the_feature_it_was_typed_for(
    page: Any, server: str, stores: Path
) -> None:
    with Annotations.open(stores / "tiny") as notes:
        for leave in ("button", "keys", "number"):
            visit(page, f"{server}/feature?sae=tiny&feature=30")
            field = page.get_by_label("Label", exact=True)
            field.fill(f"for 30 by {leave}")
            if leave == "button":
                page.get_by_role("button", name="Next").click()
                heading(page, "Feature 31")
            elif leave == "keys":
                field.press("Enter")
                page.locator(READY).click()
                for _ in range(3):
                    page.keyboard.press("n")
                    page.wait_for_timeout(40)
                settle(page)
                assert number_shown(page) > 30
            else:
                box = page.locator("[data-testid=stNumberInput] input")
                box.fill("33")
                box.press("Enter")
                heading(page, "Feature 33")
            settle(page)
            assert notes.get(30).label == f"for 30 by {leave}"
            assert not set(notes.labels()) & {31, 32, 33, 34}


@pytest.mark.slow
def test_leafing_puts_no_older_text_back(page: Any, server: str, stores: Path) -> None:
    numbers = range(42, 50)
    visit(page, f"{server}/feature?sae=tiny&feature=42")
    with Annotations.open(stores / "tiny") as others:
        for turn in range(8):
            page.keyboard.press("p" if number_shown(page) > 45 else "n")
            page.wait_for_timeout(60)
            for number in numbers:
                others.set_label(number, f"{number} of {turn}")
                others.set_note(number, f"note {number} of {turn}")
                if turn % 2:
                    others.add_to_list(number)
                else:
                    others.remove_from_list(number)
            page.locator(READY).click()
            for step in range(6):
                page.keyboard.press("np"[(step + turn) // 3 % 2])
                page.wait_for_timeout((30, 80, 150, 250)[turn % 4])
            settle(page)
            for number in numbers:
                found = others.get(number)
                wanted = (f"{number} of {turn}", f"note {number} of {turn}")
                assert (found.label, found.note) == wanted
            assert [n for n in others.members() if n in numbers] == (
                list(numbers) if turn % 2 else []
            )
        for number in numbers:
            others.set_label(number, "")
            others.remove_from_list(number)


@pytest.mark.slow
def test_a_text_changed_elsewhere_is_not_overwritten_unseen(
    page: Any, server: str, stores: Path
) -> None:
    with Annotations.open(stores / "tiny") as others:
        others.set_label(35, "")
        visit(page, f"{server}/feature?sae=tiny&feature=35")
        others.set_label(35, "theirs")
        field = page.get_by_label("Label", exact=True)
        field.fill("mine")
        field.press("Enter")
        heading(page, "Feature 35 · theirs")
        said = page.locator("[data-testid=stAlert]").inner_text()
        assert "“theirs”" in said
        assert "“mine”" in said
        assert others.get(35).label == "theirs"
        field.fill("mine")
        field.press("Enter")
        heading(page, "Feature 35 · mine")
        assert others.get(35).label == "mine"
        field.fill("")
        field.press("Enter")
        page.wait_for_function(f"!document.querySelector('{READY}').innerText.endsWith('mine')")
        assert others.get(35).label == ""
