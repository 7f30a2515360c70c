"""The Circuits page and the page that it exports, in headless Chromium."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashboards.circuits.drawing import Texts
from dashboards.circuits.export import page as exported
from sae.circuits.files import save
from sae.circuits.graph import EMBEDDING, FEATURE, LOGIT, Graph
from sae.circuits.pruning import with_influence
from sae.circuits.subgraphs import Subgraph
from tests.browsing import complaints, settle, visit
from tests.e2e.test_export_browser import opened
from tests.explorer_process import serving
from tests.hand_graphs import TOKENS, hand_graph
from tests.tiny_store import make_tiny_store

__all__ = ["opened"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.browser]


def tall() -> Graph:
    """A feature a layer, one from the other, from the last of 40 tokens to the output."""
    layers, tokens = 30, [f" w{n}" for n in range(40)]
    size = layers + len(tokens) + 1
    adjacency = np.zeros((size, size))
    chain = [size - 2, *range(layers), size - 1]
    adjacency[chain[1:], chain[:-1]] = 1
    every, outside = np.arange(layers), np.full(len(tokens), -1)
    position = np.concatenate([np.full(layers, 39), np.arange(40), [39]])
    return hand_graph(
        token_ids=list(range(40)), tokens=tokens, n_layers=layers,
        sites=[f"blocks.{n}.mlp.hook_in" for n in range(layers)], saes=["t"] * layers,
        kind=[FEATURE] * layers + [EMBEDDING] * 40 + [LOGIT],
        site=[*every, *outside, -1], layer=[*every, *outside, layers], position=position,
        number=[*every, *range(40), 20], activation=np.ones(size), value=np.ones(size),
        bias=np.zeros(size), weight=[*[0] * (size - 1), 1], influence=np.zeros(size),
        cumulative=np.ones(size), adjacency=adjacency, labels={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("circuits")
    make_tiny_store(root / "stores")
    (root / "graphs").mkdir()
    save(with_influence(hand_graph()), root / "graphs" / "two.npz")
    save(with_influence(tall()), root / "graphs" / "tall.npz")
    with serving(root / "stores", root / "explore.txt") as address:
        yield address


def node(page: Any, name: str) -> Any:
    return page.locator(f".node[data-node='{name}']")


def test_a_graph_is_clicked_pinned_and_pruned(page: Any, server: str) -> None:
    visit(page, f"{server}/circuits?graph=two.npz&keep=100&edges=100")
    page.locator(".node").first.wait_for()
    assert page.locator(".node[data-node]").count() == 12
    node(page, "1_5_3").click()
    page.wait_for_url("**node=1_5_3**")
    settle(page)
    said = page.locator(".side").inner_text()
    assert "−1.00" in said
    assert "line <end> & more" in said
    assert page.locator(".link.plus").count() == 2, "from feature 9, and to output 0"
    assert page.locator(".link.minus").count() == 1, "from feature 3"
    page.locator(".side .pin").click()
    page.wait_for_url("**pinned=1_5_3**")
    settle(page)
    # by keyboard: the selected node is the one that Tab comes to
    node(page, "1_5_3").focus()
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.shadowRoot?.activeElement?.dataset.node"
    below = page.evaluate(focused) or page.evaluate("document.activeElement.dataset.node")
    assert below == "0_3_3"
    page.keyboard.press("p")
    page.wait_for_url("**pinned=1_5_3*0_3_3**")
    settle(page)
    assert page.locator(".node.pinned").count() == 2
    assert page.locator(".box").count() == 2
    slider = page.get_by_role("slider").first
    slider.focus()
    for _ in range(12):  # fast: the address in the browser is behind, and must not win
        slider.press("ArrowLeft")
    page.wait_for_url("**keep=88**")
    node(page, "error_1_3").wait_for(state="detached")
    assert slider.get_attribute("aria-valuetext") == "88"
    left = page.locator(".node[data-node]").evaluate_all("all => all.map(e => e.dataset.node)")
    assert len(left) < 12
    assert {"1_5_3", "0_3_3"} <= set(left), "what is pinned stays"
    for width in (400, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not complaints(page)


def test_thirty_layers_are_seen_at_once_from_outputs_to_tokens(page: Any, server: str) -> None:
    page.set_viewport_size({"width": 1280, "height": 900})
    visit(page, f"{server}/circuits?graph=tall.npz&keep=100&edges=100")
    last = node(page, "E_39_39")
    last.wait_for()
    assert page.locator(".node[data-node]").count() == 71
    boxes = {
        name: page.locator(name).first.bounding_box() for name in (".scroller", ".heads", ".names")
    }
    token, output = last.bounding_box(), node(page, "31_20_39").bounding_box()
    assert output["y"] >= boxes[".scroller"]["y"]
    assert token["y"] + token["height"] <= boxes[".heads"]["y"] + 2
    # heads that are scrolled away are under the corner, not in the column of layers' names
    assert page.locator(".scroller").evaluate("e => e.scrollLeft") > 0
    heads = page.locator(".heads")
    heads.scroll_into_view_if_needed()
    box, named = heads.bounding_box(), boxes[".names"]
    at = [named["x"] + named["width"] / 2, box["y"] + 20]
    top = "(e, [x, y]) => e.getRootNode().elementFromPoint(x, y).className"
    assert heads.evaluate(top, at) == "corner"


def test_the_exported_page_opens_offline(tmp_path: Path, opened: Any) -> None:
    texts = Texts({"1_5_3": "</script><img src=x onerror=alert(1)>"})
    pinned = Subgraph(pinned=("0_3_1", "0_9_2", "1_5_3"), supernodes={"early": ("0_3_1", "0_9_2")})
    file = tmp_path / "two.html"
    file.write_text(exported(with_influence(hand_graph()), texts, pinned), encoding="utf-8")
    opened.goto(file.as_uri())
    opened.locator(".node").first.wait_for()
    heads = opened.locator(".heads div").all_text_contents()
    assert heads == [*TOKENS[:2], "↵", TOKENS[3]]
    assert opened.locator("img").count() == 0
    node(opened, "3_20_3").hover()
    assert "probability 75 %" in opened.locator(".tip").inner_text()
    node(opened, "1_5_3").click()
    assert opened.locator(".side h6").inner_text() == "</script><img src=x onerror=alert(1)>"
    assert opened.locator(".box").first.inner_text() == "early (2)"
    opened.locator(".sub text").get_by_text("+1.00").wait_for()
    opened.locator("input[type=range]").fill("30")
    visible = "all => all.filter(e => e.style.display !== 'none').map(e => e.dataset.node)"
    left = opened.locator(".node[data-node]").evaluate_all(visible)
    assert "error_1_3" not in left
    assert {"E_8_1", "3_21_3", "0_3_1"} <= set(left), "ends and pins stay"
    opened.set_viewport_size({"width": 400, "height": 900})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
