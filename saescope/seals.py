"""Seals: checksums of an artefact's files, and of the JSON that lists them, verified on reading.

An artefact's JSON (its configuration, state or manifest) lists its other files with their sizes and
crc32c, and carries its own sha256. crc32c finds any burst of up to 32 flipped bits, and all but one
in 2^32 of other damage; it is some seven times as fast as sha256.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from saescope.artefact import SEAL, DamagedError, sha256_json, write_json
from saescope.paths import AnyPath

FILES = "files"
_PIECE = 1 << 18
"""bytes read at once: their checksum is taken while they are in the processor's cache"""

FileSeal = dict[str, Any]
"""a file's size in bytes, and its crc32c as eight hexadecimal digits"""


def crc32c_text(data: bytes, before: str = "00000000") -> str:
    """The crc32c of bytes as hexadecimal digits; `before` is the crc32c of the bytes before them.

    >>> crc32c_text(b"6789", crc32c_text(b"12345")) == crc32c_text(b"123456789") == "e3069283"
    True
    """
    return f"{google_crc32c.extend(int(before, 16), data):08x}"


def seal_of(path: Path) -> FileSeal:
    """The seal of a file as it is now."""
    size, crc = 0, 0
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(_PIECE):
            crc = google_crc32c.extend(crc, piece)
            size += len(piece)
    return {"bytes": size, "crc32c": f"{crc:08x}"}


def seal_of_bytes(data: bytes) -> FileSeal:
    """The seal of a file with this content."""
    return {"bytes": len(data), "crc32c": crc32c_text(data)}


def seals_of(folder: Path, names: Iterable[str]) -> dict[str, FileSeal]:
    """The seals of files of a folder, by name."""
    return {name: seal_of(folder / name) for name in names}


def check_file(path: Path, sealed: Any, what: str = "file") -> None:
    """Raise DamagedError, in which the file is called `what`, unless it matches its seal."""
    if not path.is_file():
        raise DamagedError(f"damaged {what}: the file is missing", where=str(path), kind="missing")
    if not isinstance(sealed, Mapping):
        raise DamagedError(f"damaged {what}: its checksum is missing", where=str(path))
    size, wanted = path.stat().st_size, sealed.get("bytes")
    if size != wanted:
        kind = "truncated" if isinstance(wanted, int) and size < wanted else "damaged"
        said = f"damaged {what}: it has {size:,} bytes of {wanted}"
        raise DamagedError(said, where=str(path), kind=kind)
    if seal_of(path) != dict(sealed):
        said = f"damaged {what}: its content does not match its checksum"
        raise DamagedError(said, where=str(path))


def check_files(
    folder: Path, described: Mapping[str, Any], names: Iterable[str], what: str = "file"
) -> None:
    """Raise DamagedError unless these files have the seals that an artefact's JSON lists."""
    listed = described.get(FILES)
    for name in names:
        check_file(folder / name, listed.get(name) if isinstance(listed, Mapping) else None, what)


def write_sealed(path: str | AnyPath, value: Mapping[str, Any]) -> None:
    """Write a JSON object that carries its own sha256, atomically."""
    write_json(path, sealed(value))


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own sha256 in it."""
    return {**value, SEAL: sha256_json(dict(value))}
