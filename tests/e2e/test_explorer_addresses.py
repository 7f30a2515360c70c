"""Whatever stands in an address, every page opens: rubbish in any parameter is no fault."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from dashboards import find_stores, session
from dashboards.pages import find_pages
from tests.e2e.test_explorer import APP
from tests.tiny_store import make_tiny_store

RUBBISH = {
    "empty": "",
    "word": "abc",
    "negative": "-1",
    "fraction": "0.5",
    "infinite": "1e999",
    "no number": "nan",
    "huge": "9" * 60,
    "another script's digit": "\u0663",
    "underscores": "1_0",
    "markup": "<img src=x onerror=alert(1)>**bold** :red[x] $x$",
    "path": "../../../etc/passwd",
    "NUL": "a\x00b",
    "half a character": "\ufffd",
    "emoji": "\U0001f4a5" * 300,
    "SQL": "'; DROP TABLE feature; --",
    "commas": ",,1,,-5,abc,1e9,",
    "colons": "add:5:nan:::",
    "brackets": '[{"a": [',
    "another language": "\u202eabc\u200b\n\t",
    "a wildcard": "%_*?[",
}
PAGES = [found.declared.url for found in find_pages()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    make_tiny_store(folder)
    shutil.copytree(folder / "tiny", folder / "twin")
    return folder


@pytest.fixture
def asked(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[str, ...]]]:
    """The parameters that each page opened says it reads, by the page's title."""
    declared: dict[str, tuple[str, ...]] = {}
    begin = session.begin_page

    def begin_page(title: str, parameters: Any = ()) -> session.Session:
        declared[title] = tuple(parameters)
        return begin(title, parameters)

    monkeypatch.setattr(session, "begin_page", begin_page)
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(made))
    yield declared
    st.cache_resource.clear()
    st.cache_data.clear()


def opened(url: str, **parameters: str) -> AppTest:
    """The page at an address, opened by it."""
    app = AppTest.from_file(APP, default_timeout=60)
    if url != PAGES[0]:
        app._page_hash = calc_hash(url)
    for name, value in parameters.items():
        app.query_params[name] = value
    app.run()
    said = [each.value for each in app.exception]
    assert not said, f"{url} with {parameters}: {said}"
    return app


def parameters_of(url: str, asked: dict[str, tuple[str, ...]]) -> list[str]:
    asked.clear()
    opened(url)
    (declared,) = asked.values()
    return ["sae", *declared]


def check_turns(url: str, asked: dict[str, tuple[str, ...]], turns: int) -> None:
    """Open the page with rubbish in all parameters, of another kind in each one and each turn."""
    names, rubbish = parameters_of(url, asked), list(RUBBISH.values())
    for turn in range(turns):
        values = {n: rubbish[(turn + 3 * k) % len(rubbish)] for k, n in enumerate(names)}
        app = opened(url, **values)
        assert any(each.value.startswith("## ") for each in app.markdown), values
        assert app.query_params["sae"] in (["tiny"], "tiny"), "the address is put right"


@pytest.mark.parametrize("url", PAGES)
def test_pages_open_with_rubbish_in_their_address(
    url: str, asked: dict[str, tuple[str, ...]]
) -> None:
    check_turns(url, asked, 3)


@pytest.mark.slow
@pytest.mark.parametrize("url", PAGES)
def test_rubbish_of_every_kind_in_every_parameter(
    url: str, asked: dict[str, tuple[str, ...]]
) -> None:
    check_turns(url, asked, len(RUBBISH))
