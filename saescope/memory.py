"""The machine's memory, and how this process gives freed memory back."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# names and numbers of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next allocation instead of giving them back.

    A training step or a forward pass frees and takes the same tens of megabytes again and again;
    fresh pages from the kernel cost about an eighth of a training step. Does nothing where the C
    library has no such setting.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 << 20)


@contextmanager
def cycles_later() -> Iterator[None]:
    """Within the block, Python does not look for cycles of objects that hold one another.

    For loops that make many small objects and no cycles: each look goes through all that the
    packages of a process have made, which took a third of the time of reading features for export
    beside torch. What is not in a cycle is freed at once, as ever.
    """
    if not gc.isenabled():  # a block around this one
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def physical_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
