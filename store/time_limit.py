"""Calling a function unless a block is left in time; one thread watches over all blocks.

A `threading.Timer` a query costs more processor time than most queries of a store.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Watch:
    """Deadlines of the blocks that are running, and the thread that waits for the next one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[object, tuple[float, Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None
        self._wakes = float("inf")

    def add(self, seconds: float, late: Callable[[], None]) -> object:
        """Call `late` in so many seconds, unless the key that is returned is removed before."""
        key, due = object(), time.monotonic() + seconds
        with self._changed:
            self._due[key] = due, late
            if self._thread is None or not self._thread.is_alive():  # never is in a forked process
                self._thread = threading.Thread(target=self._run, name="time limits", daemon=True)
                self._thread.start()
            elif due < self._wakes:
                self._changed.notify()
        return key

    def remove(self, key: object) -> None:
        """Forget a deadline; one that has passed is not there any more."""
        with self._changed:
            self._due.pop(key, None)

    def _run(self) -> None:
        while True:
            self._wait()
            self._call_late()

    def _wait(self) -> None:
        with self._changed:
            self._wakes = min((due for due, _ in self._due.values()), default=float("inf"))
            wait = self._wakes - time.monotonic()
            if wait > 0:
                self._changed.wait(min(wait, threading.TIMEOUT_MAX))

    def _call_late(self) -> None:
        # a method of its own, so that nothing that was called is kept while the thread waits
        with self._changed:
            now = time.monotonic()
            late = [key for key, (due, _) in self._due.items() if due <= now]
            calls = [self._due.pop(key)[1] for key in late]
        for call in calls:
            call()


_WATCH = _Watch()


@contextmanager
def time_limit(seconds: float, late: Callable[[], None]) -> Iterator[None]:
    """Call `late`, in another thread, if the block is not left within so many seconds.

    >>> with time_limit(60, lambda: print("too late")):
    ...     print("in time")
    in time
    """
    key = _WATCH.add(seconds, late)
    try:
        yield
    finally:
        _WATCH.remove(key)
