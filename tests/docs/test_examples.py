"""The examples of docs/examples that no command runs; test_pages.py runs the others."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st

from dashboards import find_stores
from dashboards.pages import VIEWS
from tests.e2e.test_explorer import links, open_page, shown
from tests.tiny_store import EVERYWHERE, make_tiny_store

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example's file stands beside the explorer's own pages."""
    make_tiny_store(tmp_path)
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path))
    (tmp_path / "views").mkdir()
    shutil.copy(EXAMPLES / "common.py", tmp_path / "views")
    package = importlib.import_module(VIEWS)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "views")])
    yield
    sys.modules.pop(f"{VIEWS}.common", None)
    st.cache_resource.clear()
    st.cache_data.clear()


@pytest.mark.usefixtures("page")
def test_the_page_of_common_features_lists_them() -> None:
    app = open_page("common")
    assert app.markdown[0].value == "## Common features"
    labels = [label for label, _ in links(app)]
    assert len(labels) == 20
    assert labels[0].replace("\\", "") == f"{EVERYWHERE}: 100.0 %"
    assert "river" in shown(app)
