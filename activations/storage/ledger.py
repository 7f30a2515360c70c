"""The ledger of a store: which windows are committed, and the checksum of all that they wrote.

`windows.jsonl` has a line a window and only grows; the manifest says how many of its bytes count,
and their sha256. So a commit costs the same however large the store is, and a chunk in the place
of another is found, though each is whole.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saescope.artefact import DamagedError
from saescope.paths import AnyPath, cut, read_bytes

LEDGER = "windows.jsonl"
LEDGER_SINCE = 2
"""The first schema of a store with a ledger; before, the manifest lists the windows."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of a store: its number, and how many of its rows are real."""

    index: int
    rows: int


@dataclass(frozen=True)
class Piece:
    """The part of a window's sequences that is in one chunk of an array [sequence, ...]."""

    number: int
    """0 for the window's first"""
    chunk: int
    start: int
    """where in the chunk"""
    offset: int
    """where in the window"""
    sequences: int


@dataclass(frozen=True)
class Window:
    """A committed run of chunks and the sequences whose rows they hold."""

    split: str
    first_chunk: int
    rows: int
    first_sequence: int
    sequences: int

    def chunks(self, chunk_rows: int) -> list[Chunk]:
        """Its chunks, all full but perhaps the last."""
        starts = range(0, self.rows, chunk_rows)
        return [
            Chunk(self.first_chunk + n, min(chunk_rows, self.rows - start))
            for n, start in enumerate(starts)
        ]

    def pieces(self, per_chunk: int) -> list[Piece]:
        """Where its sequences are in chunks of `per_chunk` of them."""
        first, last = self.first_sequence, self.first_sequence + self.sequences
        found = []
        for number, chunk in enumerate(range(first // per_chunk, -(-last // per_chunk))):
            start = max(first, chunk * per_chunk)
            end = min(last, (chunk + 1) * per_chunk)
            found.append(
                Piece(number, chunk, start - chunk * per_chunk, start - first, end - start)
            )
        return found


@dataclass(frozen=True)
class Checksums:
    """crc32c of what one window wrote."""

    rows: Mapping[str, list[int]]
    """Of each array [row, ...], by name: one for each of the window's chunks."""
    sequences: Mapping[str, list[int]]
    """Of each array [sequence, ...], by name: one for each of the window's pieces."""
    documents: int
    """Of its list of documents, a file."""


@dataclass
class Ledger:
    """Committed windows and their checksums; of stores older than the ledger, windows alone."""

    windows: list[Window] = field(default_factory=list)
    size: int = 0
    """bytes that count"""
    excess: int = 0
    """bytes after them, of a window that was not committed"""
    corrections: list[dict[str, Any]] = field(default_factory=list)
    """Chunks that were repaired with other content than was committed first, and why."""
    _rows: dict[str, list[int]] = field(default_factory=dict)
    _parts: list[tuple[Mapping[str, list[int]], int]] = field(default_factory=list)
    _digest: Any = field(default_factory=hashlib.sha256)

    @classmethod
    def of(cls, folder: AnyPath, manifest: Mapping[str, Any]) -> "Ledger":
        """The ledger of a store. Raises DamagedError if it is not the one the manifest means."""
        if manifest["schema"] < LEDGER_SINCE:
            return cls([Window(**window) for window in manifest["windows"]])
        path, committed = folder / LEDGER, manifest["ledger"]
        try:
            content = read_bytes(path)
        except FileNotFoundError:
            raise DamagedError(
                "the list of windows is missing", where=str(path), kind="missing"
            ) from None
        except OSError as error:
            raise DamagedError(
                f"the list of windows is unreadable: {error}", where=str(path), kind="unreadable"
            ) from error
        counted = content[: committed["bytes"]]
        if len(counted) < committed["bytes"]:
            raise DamagedError(
                "the list of windows is cut short", where=str(path), kind="truncated"
            )
        if hashlib.sha256(counted).hexdigest() != committed["sha256"]:
            raise DamagedError("the list of windows does not match its sha256", where=str(path))
        ledger = cls(excess=len(content) - len(counted))
        for line in counted.splitlines(keepends=True):
            ledger.add(line)
        return ledger

    @property
    def committed(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"bytes": self.size, "sha256": self._digest.hexdigest()}

    @property
    def knows_checksums(self) -> bool:
        """Whether it tells what every chunk should hold."""
        return len(self._parts) == len(self.windows)

    def rows_crc(self, array: str, chunk: int) -> int | None:
        """Checksum of a chunk of an array [row, ...]; None if it is not known."""
        return self._rows[array][chunk] if self.knows_checksums else None

    def chunk_with(self, array: str, crc: int) -> int | None:
        """The chunk of an array [row, ...] that has this checksum, if one has."""
        found = self._rows.get(array, [])
        return found.index(crc) if crc in found else None

    def sequences_crc(self, array: str, window: int, piece: Piece) -> int | None:
        """Checksum of a piece of a window of an array [sequence, ...]; None if it is not known."""
        return self._parts[window][0][array][piece.number] if self.knows_checksums else None

    def documents_crc(self, window: int) -> int | None:
        """Checksum of a window's list of documents; None if it is not known."""
        return self._parts[window][1] if self.knows_checksums else None

    def add(self, line: bytes) -> None:
        """Take a line into account: a window, or the correction of a chunk."""
        entry = json.loads(line)
        if "window" in entry:
            self.windows.append(Window(**entry["window"]))
            self._parts.append((entry["sequences"], entry["documents"]))
            for array, found in entry["rows"].items():
                self._rows.setdefault(array, []).extend(found)
        elif "chunk" in entry:
            self.corrections.append(entry)
            self._rows[entry["array"]][entry["chunk"]] = entry["crc32c"]
        else:
            self.corrections.append(entry)
            self._parts[entry["list"]] = (self._parts[entry["list"]][0], entry["crc32c"])
        self.size += len(line)
        self._digest.update(line)

    def append(self, folder: AnyPath, line: bytes) -> None:
        """Write a line after those that count, flush it to the disk and take it into account.

        It is committed once the manifest is written that counts it.
        """
        cut(folder / LEDGER, self.size, line)
        self.add(line)
        self.excess = 0


def window_line(window: Window, found: Checksums) -> bytes:
    """The ledger's line of a window."""
    return _line({"window": vars(window), **vars(found)})


def correction_line(which: Mapping[str, Any], crc: int, why: Mapping[str, Any]) -> bytes:
    """The ledger's line of a chunk, or of a list of documents, that now has another checksum."""
    return _line({**which, "crc32c": crc, "why": dict(why)})


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry, separators=(",", ":"), allow_nan=False) + "\n").encode()
