"""The lists of documents: one Parquet file a window."""

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from activations.storage.chunk_files import crc32c
from activations.storage.layout import DOCUMENTS, SPLITS, documents_part
from saescope.artefact import DamagedError, write_bytes
from saescope.paths import AnyPath, read_bytes


def write_documents(
    folder: AnyPath,
    window: int,
    split: str,
    described: Sequence[tuple[Any, ...]],
    schema: pa.Schema,
) -> int:
    """Write a window's list of documents (id, key, title, ...); the crc32c of the file."""
    rows = [(*entry[:3], SPLITS.index(split), *entry[3:]) for entry in described]
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    table = pa.table(
        [pa.array(values, kind.type) for values, kind in zip(columns, schema, strict=True)],
        schema=schema,
    )
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    write_bytes(folder / DOCUMENTS / documents_part(window), stream.getvalue())
    return crc32c(stream.getvalue())


def read_documents(path: AnyPath, schema: pa.Schema, expected: int | None) -> pa.Table:
    """A window's list, if it has the crc32c that is expected (None: any). Raises DamagedError."""
    try:
        content = read_bytes(path)
        if expected is None or crc32c(content) == expected:
            return parquet.read_table(pa.BufferReader(content), schema=schema)
    except FileNotFoundError as error:
        raise DamagedError(
            "the list of documents is missing", where=str(path), kind="missing"
        ) from error
    except (OSError, pa.ArrowInvalid) as error:
        what = f"the list of documents is damaged: {error}"
        raise DamagedError(what, where=str(path)) from error
    raise DamagedError("the list of documents is not the one committed", where=str(path))
