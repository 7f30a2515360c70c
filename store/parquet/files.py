"""The files of one store as a file system for DuckDB, which has nothing else in it.

DuckDB reads a store in Parquet through it alone, wherever the store lies: what its statements may
name is this file system's, which reads the files that the manifest lists and writes none.
"""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractFileSystem

from saescope.paths import AnyPath, read_bytes
from store.parquet.layout import TableFile

PROTOCOL = "store"
_WHOLE = 1 << 21
"""an object up to this size is fetched whole: one request instead of several"""
_CACHED = 64 << 20
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


class StoreFiles(AbstractFileSystem):
    """Reads a store's files; of an object store, the ranges read last stay in memory (64 MiB).

    They are never stale: a file of a store never changes, a new writing has new names.
    """

    protocol = PROTOCOL
    cachable = False

    def __init__(self, folder: AnyPath, files: Mapping[str, TableFile]) -> None:
        super().__init__()
        self._below = folder
        self._listed = files
        self._guard = threading.Lock()
        self._kept: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._kept_bytes = 0

    def _known(self, path: str) -> TableFile:
        name = str(self._strip_protocol(path))
        if name not in self._listed:
            raise FileNotFoundError(f"no file of this store: {name}")
        return self._listed[name]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name and size of a file."""
        found = self._known(path)
        return {"name": found.name, "size": found.bytes, "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        """Whether the store has this file."""
        return str(self._strip_protocol(path)) in self._listed

    def glob(self, path: str, maxdepth: int | None = None, **_: Any) -> list[str]:
        """The file of this name: there are no patterns."""
        return [str(self._strip_protocol(path))] if self.exists(path) else []

    def modified(self, path: str) -> datetime:
        """The same time for every file, as none ever changes."""
        return _EPOCH

    def _open(self, path: str, mode: str = "rb", *_: Any, **more: Any) -> Any:
        if mode != "rb":
            raise PermissionError("a store is only read")
        return _File(self, self._known(path))

    def fetch(self, file: TableFile, start: int, end: int) -> bytes:
        """A file's bytes from `start` to `end`."""
        path = self._below.joinpath(*file.name.split("/"))
        if isinstance(path, Path):
            with path.open("rb", buffering=0) as stream:
                return os.pread(stream.fileno(), end - start, start)
        if file.bytes <= _WHOLE:
            return self._of_object(path, file.name, 0, file.bytes)[start:end]
        return self._of_object(path, file.name, start, end)

    def _of_object(self, path: AnyPath, name: str, start: int, end: int) -> bytes:
        key = (name, start, end)
        with self._guard:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        data = read_bytes(path, start, end)
        with self._guard:
            if key not in self._kept and len(data) <= _CACHED // 4:
                self._kept[key] = data
                self._kept_bytes += len(data)
            while self._kept_bytes > _CACHED:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])
        return data


class _File(io.RawIOBase):
    """An open file; only as long as the manifest says."""

    def __init__(self, files: StoreFiles, file: TableFile) -> None:
        self._files = files
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence, self._file.bytes)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._at + len(view), self._file.bytes)
        if end <= self._at:
            return 0
        data = self._files.fetch(self._file, self._at, end)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
