"""The folder of downloads, converted models, compiled libraries and locks: outside any project."""

import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from saescope.errors import ArtefactError


def cache_dir() -> Path:
    """Where downloaded and converted data is kept: $SAESCOPE_CACHE, or the user's cache folder.

    Raises ArtefactError for a user without a home who names no folder.
    """
    chosen = os.environ.get("SAESCOPE_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "saescope"
    except RuntimeError:
        raise ArtefactError(
            "this user has no home folder to keep a cache in; name a folder", where="SAESCOPE_CACHE"
        ) from None


def note_file(name: str) -> Path | None:
    """Where what was measured is noted by this name; None for a user who has no cache."""
    try:
        return cache_dir() / name
    except ArtefactError:
        return None


def note(path: Path | None, text: str) -> None:
    """Write a small file of what was measured; nothing if the cache cannot be written."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        return  # measured anew by the next process


def remembered(name: str, allowed: Collection[str], measure: Callable[[], str]) -> str:
    """What was measured once on this machine, by the name of its file in the cache.

    One of `allowed`: a file that says anything else is written anew. Timing decides differently on
    a busy machine, and what it decides changes last bits, so it is asked once.
    """
    path = note_file(name)
    try:
        known = "" if path is None else path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        known = ""
    if known not in allowed:
        known = measure()
        note(path, known + "\n")
    return known
