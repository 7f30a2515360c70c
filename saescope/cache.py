"""The folder of downloads, converted models, compiled libraries and locks: outside any project."""

import os
import tempfile
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


def note(path: Path, text: str) -> None:
    """Write a small file of what was measured; nothing if the cache cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        return  # measured anew by the next process
