"""Errors of the operating system as one clear line; disk space; reading files of unknown origin.

Libraries in Rust give the system's error number only in their message, torch and NumPy sometimes
not even there.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import overload

from saescope.errors import ArtefactError, SaescopeError
from saescope.paths import AnyPath, read_bytes

_AGAIN = "and run the same command again: it goes on from what was committed"
_FULL = {
    errno.ENOSPC: f"the disk is full; free some space {_AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; free some space {_AGAIN}",
    errno.EFBIG: f"a file may not grow further (see ulimit -f); raise the limit {_AGAIN}",
}
_SAID = {
    **_FULL,
    errno.EACCES: "permission denied: it may not be read, or not be written to",
    errno.EPERM: "the system does not permit that",
    errno.EROFS: "is on a file system that can only be read",
    errno.ENOENT: "no such file or folder",
    errno.EEXIST: "is there already",
    errno.EISDIR: "is a folder, and a file is needed",
    errno.ENOTDIR: "is no folder, or lies below something that is none",
    errno.ENOTEMPTY: "is a folder that something was put into meanwhile",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.ELOOP: "symbolic links lead in a circle",
    errno.EIO: "reading or writing failed (EIO): the disk, or the way to it, may be damaged",
    errno.EMFILE: "too many files are open in this process (see ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "there is not enough memory",
}
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_NO_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|Unable to allocate")
_CUT_SHORT = re.compile(
    r"\d+ requested and \d+ written|PytorchStreamWriter failed|unexpected pos \d+ vs"
)
_ZEROS = bytes(1 << 20)
_IN_PREPARATION = re.compile(r"/\.[^/]+\.[a-z0-9_]{8}\.partial(?=/)")


@contextmanager
def system_errors(where: object = "") -> Iterator[None]:
    """Turn an error of the operating system into one ArtefactError; other errors are raised as is.

    The error names the file that the system names, or else `where`.
    """
    try:
        yield
    except (SaescopeError, BrokenPipeError):
        raise
    except Exception as error:
        number = _number(error)
        what = _words(error, number)
        if what is None:
            raise
        named = [_IN_PREPARATION.sub("", str(each)) for each in (_file(error), where) if each]
        at = named[-1 if number in _FULL else 0] if named else ""
        raise ArtefactError(what, where=at) from error


def reserve(path: Path, size: int) -> None:
    """Extend a file to `size` bytes, with room on the disk reserved for all of them.

    Without reserved room, a process that writes to a mapped file is killed (SIGBUS) when the disk
    is full. Raises OSError if the disk is full; the file is then as long as there was room.
    """
    with path.open("ab") as stream:
        if hasattr(os, "posix_fallocate"):
            if size:
                os.posix_fallocate(stream.fileno(), 0, size)
            return
        while (left := size - stream.tell()) > 0:
            stream.write(_ZEROS[:left])
        stream.flush()
        os.fsync(stream.fileno())


@overload
def free_bytes(path: Path) -> int: ...
@overload
def free_bytes(path: AnyPath) -> int | None: ...
def free_bytes(path: AnyPath) -> int | None:
    """Free bytes on the disk of a file or folder, which need not be there yet.

    None in an object store, which has no such limit.
    """
    if not isinstance(path, Path):
        return None
    absolute = path.absolute()
    existing = next(p for p in (absolute, *absolute.parents) if p.exists())
    return shutil.disk_usage(existing).free


def check_readable(path: Path) -> None:
    """Raise ArtefactError for a file that exists but cannot be read.

    For libraries that report such a file as missing.
    """
    with system_errors(path):
        descriptor = _opened(path)
    if descriptor is not None:
        os.close(descriptor)


def read_whole(path: AnyPath, *, largest: int) -> bytes:
    """All bytes of a plain file, or of an object.

    Raises FileNotFoundError if there is none; ArtefactError if it is no plain file (a folder, a
    pipe), has more than `largest` bytes, or cannot be read.
    """
    if not isinstance(path, Path):
        return read_bytes(path)
    with system_errors(path):
        descriptor = _opened(path)
    if descriptor is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with system_errors(path), os.fdopen(descriptor, "rb") as stream:
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "no plain file"
            raise ArtefactError(f"is {what}, and a file is needed", where=str(path))
        data = stream.read(largest + 1)
    if len(data) > largest:
        raise ArtefactError(
            "is too large to be what it should be",
            where=str(path),
            given=f"{path.stat().st_size:,} bytes",
            allowed=f"up to {largest:,}",
        )
    return data


def _opened(path: Path) -> int | None:
    """Descriptor of a file, None if there is none; a pipe is opened without waiting."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        if path.is_symlink():
            raise ArtefactError("is a symbolic link to nothing", where=str(path)) from None
        return None


def _words(error: Exception, number: int | None) -> str | None:
    if number is not None:
        return _SAID.get(number) or f"the system says: {os.strerror(number)}"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return "a name or a text holds characters that cannot be written (lone surrogates)"
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return "a name may not hold a NUL character"
    if isinstance(error, OSError):
        return f"cannot be read or written: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None


def _number(error: Exception) -> int | None:
    """The system's error number (errno); None if the error is not the system's."""
    if isinstance(error, OSError) and error.errno in errno.errorcode:
        return error.errno
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return errno.ENOMEM
    if found := _NUMBER.search(text):
        number = int(found[1] or found[2])
        return number if number in errno.errorcode else None
    if isinstance(error, RuntimeError | OSError):
        if _NO_MEMORY.search(text):
            return errno.ENOMEM
        if _CUT_SHORT.search(text):
            return errno.ENOSPC
    return None


def _file(error: Exception) -> str:
    """The file that the error is about; of a rename, its target."""
    if not isinstance(error, OSError):
        return ""
    name = error.filename2 or error.filename
    return os.fsdecode(name) if isinstance(name, str | bytes) else ""
