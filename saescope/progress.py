"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from saescope.system import system_errors
from saescope.terminal import harmless

_LINE_EVERY_S = 10.0
_silent = [False]
"""stack: whether printing is off in each context, the innermost last"""


@contextmanager
def silent(really: bool = True) -> Iterator[None]:
    """Print nothing within the context, for ranks but the first; with really=False, do print."""
    _silent.append(really)
    try:
        yield
    finally:
        _silent.pop()


def say(text: str = "", *, lines: bool = False) -> None:
    """Print one line to standard output, at once; with `lines`, a text of several.

    Raises ArtefactError if it cannot be written, BrokenPipeError if nobody reads it any more.
    """
    if _silent[-1]:
        return
    with system_errors("standard output"):
        sys.stdout.write(f"{harmless(text, lines=lines)}\n")
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """Seconds as people read them.

    >>> duration(3.2), duration(75), duration(7300)
    ('3s', '1m15s', '2h01m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def as_size(nbytes: float) -> str:
    """Bytes as people read them.

    >>> as_size(2.5e9), as_size(1.26e7), as_size(31_000)
    ('2.50 GB', '12.6 MB', '0.0 MB')
    """
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _per_second(rate: float) -> str:
    """A rate as people read it.

    >>> _per_second(12345.6), _per_second(0.42)
    ('12,346/s', '0.42/s')
    """
    return f"{rate:,.0f}/s" if rate >= 1 else f"{rate:.2g}/s"


class Progress:
    """Count work done, and show it.

    >>> with Progress("reading", total=3, unit="files") as progress:  # doctest: +SKIP
    ...     for _ in range(3):
    ...         progress.advance()
    """

    def __init__(self, description: str, total: int, unit: str = "it", done: int = 0) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = done
        self._start_done = done
        self._adding = threading.Lock()
        self._note = ""
        self._bar = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        if sys.stdout.isatty() and not _silent[-1]:
            self._bar = _RichBar(self.description, self.total, self.unit, self.done)
        else:
            resumed = f", {self.done:,} done before" if self.done else ""
            say(f"{self.description}: {self.total:,} {self.unit}{resumed}")
        return self

    def advance(self, n: int = 1, note: str = "") -> None:
        """Add n units of finished work; note replaces the short text shown at the end."""
        with self._adding:  # another thread may count too
            self.done += n
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self.done, self._note)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            say(self._line())

    def rate(self) -> float:
        """Units a second since this run began."""
        elapsed = time.monotonic() - self._started
        return (self.done - self._start_done) / elapsed if elapsed > 0 else 0.0

    def _line(self) -> str:
        rate = self.rate()
        left = duration((self.total - self.done) / rate) if rate > 0 else "unknown"
        percent = 100 * self.done / self.total if self.total else 100.0
        note = f", {self._note}" if self._note else ""
        return (
            f"{self.description}: {percent:3.0f}%  {self.done:,}/{self.total:,} {self.unit}, "
            f"{_per_second(rate)}, {left} left{note}"
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        elapsed = duration(time.monotonic() - self._started)
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            note = f", {self._note}" if self._note else ""
            say(f"{self.description}: done, {self.done:,} {self.unit} in {elapsed}{note}")


class _RichBar:
    """The bar on a terminal; rich is imported only where there is one."""

    def __init__(self, description: str, total: int, unit: str, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            transient=True,
        )
        self._task = self._progress.add_task(
            _plain(description), total=total, completed=done, rate="", note=""
        )
        self._progress.start()

    def update(self, done: int, note: str) -> None:
        speed = self._progress.tasks[0].speed
        rate = _per_second(speed) if speed else ""
        self._progress.update(self._task, completed=done, note=_plain(note), rate=rate)

    def stop(self) -> None:
        self._progress.stop()


def _plain(text: str) -> str:
    """Text without control characters and without rich's markup."""
    from rich.markup import escape

    return escape(harmless(text))
