"""The explorer on stores in Parquet, in an object store and in a folder beside others."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st

from dashboards import find_stores
from saescope.errors import ArtefactError
from saescope.paths import as_path, remove
from store import Annotations, FeatureStore
from store.export.parquet_store import write_parquet_store
from tests.e2e.test_explorer import FEATURE, FEATURES, open_page, shown
from tests.tiny_store import EVERYWHERE, make_tiny_store

URL = "memory://explored/stores"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny store's file, with copies of the store in Parquet in memory and beside it."""
    folder = tmp_path_factory.mktemp("made")
    path = make_tiny_store(folder)
    with pytest.MonkeyPatch.context() as patch, FeatureStore.open(path) as store:
        patch.setenv("SAESCOPE_CACHE", str(folder / "cache"))
        write_parquet_store(store, as_path(f"{URL}/remote"))
        write_parquet_store(store, folder / "large")
    yield path
    remove(as_path(URL))


@pytest.mark.parametrize("given", [URL, f"{URL}/remote", f"{URL}/remote/manifest.json"])
def test_a_store_at_a_url_is_explored(
    made: Path, tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv(
        find_stores.STORES_VARIABLE,
        find_stores.environment(given, model=(), sae=())[find_stores.STORES_VARIABLE],
    )
    assert list(find_stores.stores()) == ["remote"]
    with Annotations.open(f"{URL}/remote", sae_hash="5ae") as notes:
        notes.set_label(EVERYWHERE, "everywhere it is")
    page = open_page(FEATURE, sae="remote", feature=str(EVERYWHERE))
    assert "everywhere it is" in shown(page) or "everywhere it is" in str(page.text_input)
    if given == URL:
        assert "tiny-llama" in shown(open_page())
        assert not open_page(FEATURES, sae="remote").error
    st.cache_resource.clear()
    st.cache_data.clear()


def test_stores_of_both_kinds_lie_in_one_folder(made: Path) -> None:
    folder = made.parent.parent
    assert {name: path.name for name, path in find_stores.find_stores(folder).items()} == {
        "large": "manifest.json",
        "tiny": "features.duckdb",
    }
    assert find_stores.find_stores(folder / "large").keys() == {"large"}
    with pytest.raises(ArtefactError, match=r"memory://explored/none: no feature store here"):
        find_stores.find_stores("memory://explored/none")
