"""A page or a panel of the explorer is one file, found by what it declares."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from streamlit.testing.v1 import AppTest

from dashboards import pages
from dashboards.pages import Page, Panel, find_pages, find_panels, page_at
from saescope.errors import InputError
from store import FeatureStore
from tests.e2e.test_explorer import FEATURE, OVERVIEW, folder, made, open_page, shown
from tests.tiny_store import DEAD, RARE

__all__ = ["folder", "made"]  # fixtures

Write = Callable[[str, str, str], Path]

PAGE = """
import streamlit as st
from dashboards.pages import Page
from dashboards.session import begin_page, link

PAGE = Page(title="Longest labels", icon=":material/label:", order=25, url="longest-labels")

def render():
    session = begin_page("Longest labels")
    st.caption(f"a page of {session.name}")
    link(session, 5, "the fifth")

if __name__ == "__main__":
    render()
"""
PANEL = """
import streamlit as st
from dashboards.pages import Panel

PANEL = Panel(
    title="Dead for how long", order=15, help="why", applies=lambda data: data.feature.dead
)

def panel(session, data):
    st.caption(f"{session.name} {data.feature.feature}: for ever")
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a file into a folder that also belongs to the package of pages, or of panels."""
    written: list[str] = []

    def into(package: str, name: str, text: str) -> Path:
        more = tmp_path / package.rpartition(".")[2]
        more.mkdir(exist_ok=True)
        module = importlib.import_module(package)
        if str(more) not in module.__path__:
            monkeypatch.setattr(module, "__path__", [*module.__path__, str(more)])
        (more / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        written.append(f"{package}.{name}")
        return more / f"{name}.py"

    yield into
    for name in written:
        sys.modules.pop(name, None)


def navigation(app: AppTest) -> list[str]:
    """Titles of the pages in the navigation, in order."""
    pages = app._registered_pages.values()
    # a page that is in no menu leads from this address to the first page
    return [str(page.get("page_name")) for page in pages if page.get("url_pathname") != OVERVIEW]


def test_the_explorers_own_pages_and_panels() -> None:
    found = [(p.declared.title, p.declared.icon, p.declared.url) for p in find_pages()]
    assert found == [
        ("Home", ":material/home:", "overview"),
        ("Features", ":material/table_rows:", "features"),
        ("Map", ":material/bubble_chart:", "map"),
        ("Feature", ":material/search:", "feature"),
        ("Token", ":material/match_word:", "token"),
        ("Prompt", ":material/edit_note:", "text"),
        ("Steer", ":material/explore:", "steer"),
        ("Circuits", ":material/account_tree:", "circuits"),
        ("Diff", ":material/difference:", "diff"),
        ("Compare", ":material/compare_arrows:", "compare"),
        ("Evaluation", ":material/fact_check:", "evaluation"),
        ("Models", ":material/join_inner:", "models"),
        ("Layers", ":material/layers:", "layers"),
        ("Heads", ":material/hub:", "heads"),
        ("Pictures", ":material/photo_library:", "pictures"),
        ("Training", ":material/show_chart:", "training"),
        ("SQL", ":material/database:", "sql"),
    ]
    assert [p.declared.title for p in find_panels("left")] == [
        *(
            "Ends",
            "Label",
            "Use",
            "Tags, lists, votes",
            "Machine labels",
            "Activations",
            "Layers",
            "Tokens and positions",
            "Effect on the next token",
            "Topics and sources",
            "Attention heads",
        ),
        "Related features",
        "How it emerged",
        "Export",
    ]
    assert [p.declared.title for p in find_panels("right")] == [
        "Attribution",
        "Examples",
        "Pictures",
    ]


def test_a_feature_leads_to_steering_and_to_a_prompt(folder: Path) -> None:
    app = open_page(FEATURE, sae="tiny", feature=str(RARE))
    ways = {x.proto.label: parse_qs(x.proto.query_string) for x in app.get("page_link")}
    with FeatureStore.open(folder / "tiny") as store:
        strongest, text = store.feature(RARE).max, store.examples(RARE, "top", 16)[0].tokens
    assert ways["Steer with it"]["edits"] == [f"add:{RARE}:{strongest:.4g}"]
    assert ways["Test your text"]["locked"] == [str(RARE)]
    assert ways["Test your text"]["text"] == ["".join(text).strip()]
    dead = [x.proto.label for x in open_page(FEATURE, feature=str(DEAD[0])).get("page_link")]
    assert "Steer with it" not in dead


def test_a_page_is_added_by_its_file(folder: Path, write: Write) -> None:
    assert navigation(open_page()) == [page.declared.title for page in find_pages()]
    write(pages.VIEWS, "longest_labels", PAGE)
    write(pages.VIEWS, "_helper", "")
    app = open_page("longest-labels")
    assert navigation(app)[1:5] == ["Features", "Longest labels", "Map", "Feature"]
    assert app.markdown[0].value == "## Longest labels"
    assert "a page of tiny" in shown(app)
    assert [(x.proto.page, x.proto.icon) for x in app.get("page_link")] == [("feature", "")]


def test_a_panel_is_added_by_its_file(folder: Path, write: Write) -> None:
    write(pages.PANELS, "dead_for", PANEL)
    app = open_page(FEATURE, feature=str(DEAD[0]))
    (heading,) = [m for m in app.markdown if m.value == "##### Dead for how long"]
    assert heading.help == "why"
    titles = [m.value for m in app.markdown if m.value.startswith("#####")]
    assert titles.index("##### Dead for how long") < titles.index("##### Effect on the next token")
    assert f"tiny {DEAD[0]}: for ever" in shown(app)
    assert "Dead for how long" not in shown(open_page(FEATURE, feature="5")), "it does not apply"


@pytest.mark.parametrize("text", ["", "PAGE = 'Mine'\ndef render(): ...", PAGE.partition("def")[0]])
def test_a_page_without_a_declaration_is_one_clear_error(
    folder: Path, write: Write, text: str
) -> None:
    file = write(pages.VIEWS, "undeclared", text)
    app = AppTest.from_file(str(Path(pages.__file__).parent / "app.py"), default_timeout=60).run()
    (error,) = app.error
    said = error.value.replace("\\", "")
    assert f"{file}: is no page of the explorer: it has no PAGE or no function render" in said
    assert "PAGE = Page(...) and def render(...)" in said
    assert not app.exception


def test_a_panel_without_a_declaration_is_one_clear_error(folder: Path, write: Write) -> None:
    file = write(pages.PANELS, "undeclared", "PANEL = None")
    (error,) = open_page(FEATURE, feature="5").error
    assert f"{file}: is no panel of the explorer" in error.value.replace("\\", "")


def test_two_pages_cannot_have_one_url(write: Write) -> None:
    file = write(pages.VIEWS, "another", PAGE.replace("longest-labels", "text"))
    with pytest.raises(InputError, match=r"has the URL of .*\.py \(given: 'text'\)") as caught:
        find_pages()
    assert str(file) in str(caught.value)


def test_wrong_declarations() -> None:
    for url in ("", "a/b", "A", "a b", "../a"):
        with pytest.raises(InputError, match="cannot be a page's URL"):
            Page(title="x", icon="", order=1, url=url)
    with pytest.raises(InputError, match=r"no such column \(given: 'middle'; allowed: left, right"):
        Panel(title="x", order=1, column="middle")
    with pytest.raises(InputError, match=r"no page has this URL \(given: 'gone'; allowed: overv"):
        page_at("gone")
