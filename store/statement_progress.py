"""How far a long statement of DuckDB is, shown while it runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from saescope.progress import Progress

_EVERY_S = 0.25


def can_be_watched(con: Any) -> None:
    """Have DuckDB estimate how far its statements are, without printing that itself."""
    con.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
    con.execute("SET progress_bar_time = 0")


@contextmanager
def watched(con: Any, progress: Progress, steps: int, note: str) -> Iterator[None]:
    """Count `steps` while the statements of this block run, as DuckDB estimates how far they are.

    Args: con: a connection that `can_be_watched`, and runs one long statement in the block.
    """
    counted = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal counted
        while not ended.wait(_EVERY_S):
            share = min(max(con.query_progress(), 0.0), 100.0) / 100  # -1 where it does not know
            more = int(share * steps) - counted
            if more > 0:
                counted += more
                progress.advance(more, note)

    thread = threading.Thread(target=watch, name="statement-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    progress.advance(steps - counted, note)
