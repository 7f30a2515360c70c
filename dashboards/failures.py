"""What a reader sees when a page fails: a sentence that says what to do, never a traceback."""

import errno
import os
import sys
import traceback
from datetime import datetime
from pathlib import Path

import streamlit as st

from dashboards.tokens import plain
from saescope.cache import cache_dir
from saescope.errors import SaescopeError

LOG = "explorer.log"
_LARGEST_LOG = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def show(error: Exception) -> bool:
    """Show an error on the page where it arose; True, as Streamlit is to show nothing more.

    An error of ours says what to do. Of any other the traceback is appended to a file, whose path
    is shown.
    """
    if isinstance(error, SaescopeError):
        st.error(plain(error), icon=":material/error:")
    elif isinstance(error, OSError) and error.errno in _FULL:
        st.error(
            "The disk is full. Free some space, then load this page again; what you typed last is "
            "not saved.",
            icon=":material/hard_drive:",
        )
    elif isinstance(error, MemoryError):
        st.error(
            "There is too little memory for this. End other programs, or restart the explorer.",
            icon=":material/memory_alt:",
        )
    else:
        st.error(_unexpected(error), icon=":material/error:")
    return True


def _unexpected(error: Exception) -> str:
    log = _written(error)
    where = f"in {plain(log)}" if log else "in the terminal where the explorer was started"
    return (
        f"This page has a fault ({plain(type(error).__name__)}), which is saescope's and not "
        f"yours. Load the page again, or choose another one. The details are {where}; please send "
        "them along when you report it."
    )


def _written(error: Exception) -> Path | None:
    """The file that the traceback was appended to; None if it could not be."""
    try:
        log = cache_dir() / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > _LARGEST_LOG:
            os.replace(log, log.with_suffix(".log.1"))
        text = "".join(traceback.format_exception(error))
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{datetime.now().isoformat(timespec='seconds')} {sys.version}\n{text}\n")
    except (OSError, SaescopeError):
        return None
    return log
