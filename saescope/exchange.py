"""Two renames that Python lacks: exchanging two paths in one step, and renaming without replacing.

Linux has renameat2 for them, macOS renamex_np; not every file system supports them.
"""

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

_LACKING = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_HERE = -100  # AT_FDCWD of Linux: paths are as usual
_EXCHANGE = {"linux": 2, "darwin": 2}  # RENAME_EXCHANGE; RENAME_SWAP
_NEW = {"linux": 1, "darwin": 4}  # RENAME_NOREPLACE; RENAME_EXCL


def exchange(one: Path, other: Path) -> bool:
    """Exchange two files or folders in one step: both paths exist at every instant.

    Returns False, and changes nothing, where the file system cannot do that. Raises OSError.
    """
    return _rename(one, other, _EXCHANGE)


def rename_new(path: Path, to: Path) -> None:
    """Rename a file or a folder to a path where nothing is; an empty folder counts as nothing.

    Raises FileExistsError if something is there, OSError as rename does.
    """
    if path.is_dir() and to.is_dir() and not to.is_symlink():
        path.rename(to)  # fails if anything is in it
    elif not _rename(path, to, _NEW):
        if os.path.lexists(to):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to))
        path.rename(to)


def _rename(one: Path, other: Path, flags: dict[str, int]) -> bool:
    call = _system_call()
    if call is None:
        return False
    # as Python does for its own renames, for whoever watches what changes the disk
    sys.audit("os.rename", str(one), str(other), -1, -1)
    ctypes.set_errno(0)
    if sys.platform == "linux":
        failed = call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), flags[sys.platform])
    else:
        failed = call(os.fsencode(one), os.fsencode(other), flags[sys.platform])
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _system_call() -> Any:
    """The C library's function; None where it has none."""
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform)
    return getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
