"""Times of the explorer's pages in a real browser: rows of results/explorer.csv.

    python -m benchmarks.explorer --store PROJECT/stores/NAME
    python -m benchmarks.explorer --folder FOLDER    # a synthetic store of 10^8 activations there

A synthetic store that is in the folder already is used again. Every page is opened once, and then
timed again and again by its address. Server time is from the browser's request for the page to the
last message that the page is drawn from; whole time also has the loading of scripts and drawing.
Needs Chromium and playwright.
"""

import csv
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from benchmarks.running import run
from benchmarks.store_queries import build
from dashboards.find_stores import find_stores
from sae.bench.rows import processor
from saescope.artefact import git_commit
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.progress import say
from store import FeatureStore
from store.database import STORE_FILE
from tests.browsing import READY, chromium, complaints
from tests.explorer_process import serving

RESULTS = Path(__file__).parent / "results" / "explorer.csv"
COLUMNS = (
    "date", "page", "shape", "server_ms", "server_max_ms", "whole_ms", "repeats", "cpu",
    "streamlit version", "duckdb version", "commit",
)  # fmt: skip
_ACTIVE = 23
_QUIET_MS = 500.0
"""after so long without a message a page is drawn"""
_LONGEST_S = 60.0


@dataclass(frozen=True, kw_only=True)
class ExplorerConfig(Config):
    """Time every page of the explorer."""

    store: str | None = None
    """A store's folder to explore."""
    folder: str | None = None
    """Folder of a synthetic store instead, which is built if it is not there."""
    sequences: int = 34_300
    """Sequences of 128 tokens of a synthetic store; 34,300 have 10^8 activations."""
    d_sae: int = 16_384
    """Features of a synthetic store."""
    repeats: int = 5
    """How often each page is timed."""

    def __post_init__(self) -> None:
        for name in ("sequences", "d_sae", "repeats"):
            check_range(name, getattr(self, name), low=1)


def work(config: ExplorerConfig) -> None:
    """Time the pages and append their rows."""
    if (config.store is None) == (config.folder is None):
        raise InputError("give one of the two", where="store, folder")
    path = Path(config.store) if config.store else _synthetic(Path(str(config.folder)), config)
    ((name, file),) = find_stores(path).items()
    with FeatureStore.open(file) as store:
        shape = f"{store.meta['n_activations']} activations, d_sae {store.d_sae}"
        features = [store.random_live() or 0 for _ in range(config.repeats + 1)]
        (word,) = store.top_tokens([features[0]], 1)[features[0]][:1] or ["the"]
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "shape": shape,
        "repeats": config.repeats,
        "cpu": processor(),
        "streamlit version": version("streamlit"),
        "duckdb version": version("duckdb"),
        "commit": git_commit() or "",
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "explorer.txt"
        with serving(file, log) as address, chromium() as browser:
            rows = [{**facts, **row} for row in _pages(browser, address, name, features, word)]
    _append(rows)


def _synthetic(folder: Path, config: ExplorerConfig) -> Path:
    path = folder / STORE_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        count, seconds, _ = build(path, config.sequences, config.d_sae, _ACTIVE)
        say(f"built {count:,} activations in {seconds:.0f} s")
    return path


def _pages(
    browser: Any, address: str, name: str, features: list[int], word: str
) -> Iterator[dict[str, Any]]:
    """A row for each page, opened at the features one after the other."""
    logging.disable(logging.WARNING)  # Streamlit's, that no explorer runs in this process
    from dashboards.pages import find_pages

    for found in find_pages():
        url = found.declared.url
        times = []
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        for feature in features:
            words = {"sae": name, **_parameters(url, feature, word)}
            times.append(_timed(page, f"{address}/{url}?{urlencode(words)}"))
        said = complaints(page)
        context.close()
        server, whole = zip(*times[1:], strict=True)  # the first warms up
        row = {
            "page": url,
            "server_ms": f"{statistics.median(server):.0f}",
            "server_max_ms": f"{max(server):.0f}",
            "whole_ms": f"{statistics.median(whole):.0f}",
        }
        say(f"{url}: server {row['server_ms']} ms, whole {row['whole_ms']} ms {said or ''}")
        yield row


def _parameters(url: str, feature: int, word: str) -> Mapping[str, object]:
    """What makes the page do its work."""
    by_page: dict[str, Mapping[str, object]] = {
        "feature": {"feature": feature},
        "token": {"q": word.strip() or "the"},
        "diff": {"a": "split:train", "b": "split:held_out"},
        "sql": {"q": "SELECT feature, density FROM feature ORDER BY density DESC LIMIT 50"},
    }
    return by_page.get(url, {})


def _timed(page: Any, address: str) -> tuple[float, float]:
    """Milliseconds of the server, and from the address to the last message and the heading."""
    moments: dict[str, float] = {}

    def watch(socket: Any) -> None:
        socket.on("framesent", lambda _: moments.setdefault("asked", time.perf_counter()))
        socket.on("framereceived", lambda _: moments.update(answered=time.perf_counter()))

    page.on("websocket", watch)
    began = time.perf_counter()
    page.goto(address)
    page.wait_for_selector(READY)
    drawn = time.perf_counter()
    while time.perf_counter() - began < _LONGEST_S:
        page.wait_for_timeout(50)
        quiet = 1000 * (time.perf_counter() - max(moments.get("answered", 0.0), drawn))
        busy = page.locator("[data-testid=stStatusWidget]").count()
        if "answered" in moments and quiet > _QUIET_MS and not busy:
            break
    page.remove_listener("websocket", watch)
    last = max(moments["answered"], drawn)
    return 1000 * (moments["answered"] - moments["asked"]), 1000 * (last - began)


def _append(rows: list[dict[str, Any]]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as stream:
        writer: csv.DictWriter[str] = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    say(f"{RESULTS.name}: {len(rows)} rows more")


if __name__ == "__main__":
    run(ExplorerConfig, work)
