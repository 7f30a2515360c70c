"""Printing text of unknown origin: control characters are shown as escapes, not sent."""

import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of controls, formats (bidi among them), surrogates, line separators"""
_JOINERS = "\u200c\u200d"
"""formats that scripts and emoji need"""


def harmless(text: str, *, lines: bool = False) -> str:
    r"""Text in which every control or invisible character is written as a Python escape.

    lines: keep line breaks and tabs, of text that may have several lines.

    >>> harmless("a\x1b[31m\u202eb\nc"), harmless("a\n\tb", lines=True)
    ('a\\x1b[31m\\u202eb\\nc', 'a\n\tb')
    """
    if text.isascii() and text.isprintable():
        return text
    kept = _JOINERS + ("\n\t" if lines else "")
    return "".join(
        sign
        if sign in kept or unicodedata.category(sign) not in _UNSEEN
        else sign.encode("unicode_escape", "backslashreplace").decode()
        for sign in text
    )


class _Harmless(io.TextIOBase):
    """A stream that passes its text on to another, made harmless."""

    def __init__(self, to: Any) -> None:
        self._to = to

    def write(self, text: str) -> int:
        self._to.write(harmless(text, lines=True))
        return len(text)

    def flush(self) -> None:
        self._to.flush()


@contextmanager
def harmless_errors() -> Iterator[None]:
    """Within the context, everything written to standard error is made harmless."""
    with redirect_stderr(_Harmless(sys.stderr)):
        yield


def complain(text: str) -> None:
    """Write one line to standard error; where nobody can read it, nothing is written."""
    with suppress(OSError):
        sys.stderr.write(f"saescope: {harmless(text)}\n")
        sys.stderr.flush()


def mute(stream: Any) -> None:
    """Discard what is still to be written to a stream, since nobody reads it any more."""
    with suppress(OSError, ValueError):  # none of the system's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
