"""Pages of the explorer, and panels of its feature page, found by what their files declare.

A page is a file in dashboards/views/ with `PAGE = Page(...)` and a function `render()`, which it
calls where it is run (as a script, by Streamlit). A panel is a file in dashboards/panels/ with
`PANEL = Panel(...)` and a function `panel(session, data)`. No list names them: adding one is adding
its file. Files whose names begin with _ are none.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import streamlit as st

from dashboards.queries import FeatureData
from saescope.errors import InputError

VIEWS, PANELS = "dashboards.views", "dashboards.panels"
COLUMNS = ("left", "right")
_DRAWS = 'if __name__ == "__main__":\n    render()'
"""how a page's file ends, as Streamlit runs it"""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page's file declares."""

    title: str
    """Its name in the navigation."""
    icon: str
    """A Material symbol, as ":material/search:"."""
    order: int
    """Pages stand in this order in the navigation; the explorer opens with the first."""
    url: str
    """The last part of its address."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.url):
            allowed = "lower-case letters, digits and hyphens, beginning with a letter"
            raise InputError("cannot be a page's URL", where="url", given=self.url, allowed=allowed)


def _always(data: FeatureData) -> bool:
    del data
    return True


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What the file of a panel of the feature page declares."""

    title: str
    order: int
    """Panels of a column stand below one another in this order."""
    column: str = "left"
    """"left" (narrow) or "right" (wide)."""
    applies: Callable[[FeatureData], bool] = _always
    """For which features it is drawn."""
    heading: bool = True
    """Whether its title is written above it; not where its own fields say what it is."""
    help: str | None = None
    """What the heading's question mark explains."""

    def __post_init__(self) -> None:
        if self.column not in COLUMNS:
            raise InputError("no such column", where="column", given=self.column, allowed=COLUMNS)


_Declared = TypeVar("_Declared", Page, Panel)


@dataclass(frozen=True)
class Found(Generic[_Declared]):
    """A file's declaration, and its function that draws the page or the panel."""

    declared: _Declared
    draw: Callable[..., None]
    file: str


def find_pages() -> list[Found[Page]]:
    """All pages, in order.

    Raises InputError, which names the file, for one that declares no page, has no `render`, has the
    URL of another, or does not draw itself.
    """
    found = _find(VIEWS, "PAGE", Page, "render")
    files: dict[str, str] = {}
    for page in found:
        url = page.declared.url
        if url in files:
            raise InputError(f"has the URL of {files[url]}", where=page.file, given=url)
        files[url] = page.file
        if _DRAWS not in Path(page.file).read_text(encoding="utf-8"):
            raise InputError("does not draw itself when it is run", where=page.file, allowed=_DRAWS)
    return found


def find_panels(column: str) -> list[Found[Panel]]:
    """The panels of one column, in order.

    Raises InputError, which names the file, for one that declares no panel or has no `panel`.
    """
    found = _find(PANELS, "PANEL", Panel, "panel")
    return [panel for panel in found if panel.declared.column == column]


def streamlit_pages() -> dict[str, st.Page]:
    """Streamlit's own pages by URL, in order; the first is the one that the explorer opens with.

    That one's own address is the root; at its URL nothing is shown but the way there.
    """
    return {
        found.declared.url: st.Page(
            Path(found.file),
            title=found.declared.title,
            icon=found.declared.icon,
            url_path=found.declared.url if index else "",
            default=index == 0,
        )
        for index, found in enumerate(find_pages())
    }


def way_to_first() -> st.Page:
    """A page that is in no menu, at the URL of the first one: it leads there, parameters too."""
    url, first = next(iter(streamlit_pages().items()))

    def lead() -> None:
        st.switch_page(first, query_params=st.query_params.to_dict())

    title = find_pages()[0].declared.title
    return st.Page(lead, title=title, url_path=url, visibility="hidden")


def page_at(url: str) -> st.Page:
    """The page with this URL, to link to. Raises InputError if there is none."""
    pages = streamlit_pages()
    if url not in pages:
        raise InputError("no page has this URL", where="url", given=url, allowed=pages)
    return pages[url]


def _find(package: str, name: str, kind: type[_Declared], function: str) -> list[Found[_Declared]]:
    path = importlib.import_module(package).__path__
    files = sorted(info.name for info in pkgutil.iter_modules(path) if info.name[0] != "_")
    found = [_read(importlib.import_module(f"{package}.{f}"), name, kind, function) for f in files]
    return sorted(found, key=lambda each: each.declared.order)


def _read(module: ModuleType, name: str, kind: type[_Declared], function: str) -> Found[_Declared]:
    declared: Any = getattr(module, name, None)
    draw: Any = getattr(module, function, None)
    if not (isinstance(declared, kind) and callable(draw)):
        what = kind.__name__
        raise InputError(
            f"is no {what.lower()} of the explorer: it has no {name} or no function {function}",
            where=str(module.__file__),
            allowed=f"{name} = {what}(...) and def {function}(...)",
        )
    return Found(declared, getattr(module, function), str(module.__file__))
