"""Many at once on one explorer: readers, stores, and stores that are replaced while open."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from store import FeatureStore
from tests.browsing import READY, complaints, heading, settle, visit, watched
from tests.explorer_process import serving
from tests.tiny_store import make_tiny_store

STORES = 40
_LOADED = 90_000  # ms: five browsers draw at once, on two cores that others may want, too
KINDS = 2  # stores of two kinds, with other numbers in them

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty stores, tiny00 to tiny39, of two kinds in turn."""
    folder = tmp_path_factory.mktemp("many")
    made = [
        make_tiny_store(tmp_path_factory.mktemp("made"), seed=seed).parent for seed in range(KINDS)
    ]
    for number in range(STORES):
        shutil.copytree(made[number % KINDS], folder / "stores" / f"tiny{number:02d}")
    return folder / "stores"


@pytest.fixture(scope="module")
def features(stores: Path) -> list[int]:
    """Features that fire in both kinds of stores, with another strongest activation in each."""
    found = []
    with FeatureStore.open(stores / "tiny00") as even, FeatureStore.open(stores / "tiny01") as odd:
        for number in range(even.d_sae):
            tops = [f"{store.feature(number).max:.2f}" for store in (even, odd)]
            if "0.00" not in tops and tops[0] != tops[1]:
                found.append(number)
    return found


@pytest.fixture(scope="module")
def server(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(stores, tmp_path_factory.mktemp("log") / "explore.txt") as address:
        yield address


def server_process(address: str) -> Path:
    """The folder in /proc of the process that listens at an address."""
    wanted = f"--server.port={urlsplit(address).port}"
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if wanted in words:
            return folder
    pytest.skip("no table of processes here")


def used(process: Path) -> tuple[int, float]:
    """Open files, and MiB of memory in use.

    Sockets are not counted: Streamlit keeps three of a session for two minutes after it has ended.
    """
    pages = int((process / "statm").read_text().split()[1])
    named = [str(each.readlink()) for each in (process / "fd").iterdir()]
    return sum(name.startswith("/") for name in named), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def strongest_of(stores: Path, name: str, feature: int) -> str:
    with FeatureStore.open(stores / name) as store:
        return f"{store.feature(feature).max:.2f}"


@pytest.mark.slow
def test_five_readers_at_once_each_see_their_own_feature(
    browser: Any, server: str, stores: Path, features: list[int]
) -> None:
    contexts = [browser.new_context() for _ in range(5)]
    faults = [watched(context) for context in contexts]
    pages = [context.new_page() for context in contexts]
    for turn in range(3):
        asked = [(f"tiny{turn * 5 + n:02d}", features[(turn + 2 * n) % 9]) for n in range(5)]
        for page, (name, feature) in zip(pages, asked, strict=True):
            page.goto(f"{server}/feature?sae={name}&feature={feature}", wait_until="commit")
        for page, (name, feature) in zip(pages, asked, strict=True):
            page.wait_for_selector(".ss-ex", timeout=_LOADED)
            settle(page)
            assert page.inner_text(READY).split(" · ")[0] == f"Feature {feature}"
            assert f"sae={name}" in page.url
            wanted = strongest_of(stores, name, feature)
            assert page.locator(".ss-act").first.inner_text() == wanted
    # and all press a button in one moment
    before = [int(page.inner_text(READY).split()[1]) for page in pages]
    for page in pages:
        page.keyboard.press("n")
    for page, number in zip(pages, before, strict=True):
        page.wait_for_function(
            f"Number(document.querySelector('{READY}').innerText.split(' ')[1]) > {number}"
        )
        settle(page)
        assert complaints(page) == []
        assert f"feature={page.inner_text(READY).split()[1]}" in page.url
    for context in contexts:
        context.close()
    assert [each for each in faults if each] == []


@pytest.mark.slow
def test_a_store_replaced_while_open_is_noticed(
    page: Any, server: str, stores: Path, features: list[int]
) -> None:
    name, other, number = "tiny38", "tiny39", features[1]
    old, new = (strongest_of(stores, each, number) for each in (name, other))
    visit(page, f"{server}/feature?sae={name}&feature={number}")
    assert page.locator(".ss-act").first.inner_text() == old
    fresh = stores.parent / "fresh.duckdb"
    shutil.copyfile(stores / other / "features.duckdb", fresh)
    os.replace(fresh, stores / name / "features.duckdb")
    box = page.locator("[data-testid=stNumberInput] input")  # in the same session
    for each in (features[2], number):
        box.fill(str(each))
        box.press("Enter")
        heading(page, f"Feature {each}")
    assert page.locator(".ss-act").first.inner_text() == new
    # gone altogether, and back
    shutil.move(stores / name, stores.parent / "away")
    page.goto(f"{server}/feature?sae={name}&feature={number}")
    page.locator("[data-testid=stAlertContentWarning]").wait_for()
    assert f"no SAE named '{name}' here" in page.locator("body").inner_text()
    shutil.move(stores.parent / "away", stores / name)
    visit(page, f"{server}/feature?sae={name}&feature={number}")
    assert page.locator(".ss-act").first.inner_text() == new


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_forty_stores_leave_no_files_open_and_no_memory_taken(page: Any, server: str) -> None:
    process = server_process(server)

    def round_of_all() -> tuple[int, float]:
        for number in range(STORES):
            page.goto(f"{server}/feature?sae=tiny{number:02d}&feature={number % 9}")
            page.locator("[data-testid=stCaptionContainer]").first.wait_for()
        visit(page, server)
        time.sleep(2)
        return used(process)

    rounds = [round_of_all() for _ in range(3)]
    # a store that fell out of the cache is open until the last session that showed it is forgotten
    assert max(files for files, _ in rounds) < STORES + 10, rounds
    assert rounds[2][1] <= max(rounds[0][1], rounds[1][1]) + 30, rounds
