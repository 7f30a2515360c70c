"""What lies where in a store, and how Zarr describes it."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from activations.storage.row_formats import FILLS, SCALE, RowArray, StorageKind, site_arrays
from saescope.artefact import read_json, write_json
from saescope.errors import InputError
from saescope.paths import AnyPath

GROUP, DOCUMENTS, METADATA = "activations.zarr", "documents.parquet", "zarr.json"
PENDING = "pending"
"""Of an unfinished harvest of several processes: windows that wait for their turn."""
SPLITS = ("train", "held_out")
ROW_TOKEN = "row_token"
SEQUENCE_ARRAYS = {"tokens": "int32", "document": "int32", "keep": "bool", "split": "int8"}
"""Their chunks hold `sequences_per_window` sequences; those of all others `chunk_rows` rows."""
DOCUMENT_SCHEMA = pa.schema(
    [
        ("document", pa.int32()),
        ("key", pa.string()),
        ("title", pa.string()),
        ("split", pa.int8()),
    ]
)
DOCUMENT_NUMBER = pa.field("number", pa.uint64())


def document_schema(facts: Mapping[str, Any]) -> pa.Schema:
    """Columns of the lists of documents; with a number that tells texts apart where that is done.

    So lists of other harvests stay what they were, to the byte.
    """
    corpus = facts["config"].get("corpus") or {}
    apart = corpus.get("deduplicate", False)
    return DOCUMENT_SCHEMA.append(DOCUMENT_NUMBER) if apart else DOCUMENT_SCHEMA


def documents_part(window: int) -> str:
    """File name of one window's list of documents."""
    return f"part-{window:06d}.parquet"


def documents_window(name: str) -> int | None:
    """The window whose list of documents a file of this name is, if it is one."""
    found = re.fullmatch(r"part-(\d{6,})\.parquet", name)
    return int(found[1]) if found else None


def storage_of(facts: Mapping[str, Any]) -> StorageKind:
    """How a store has its rows; harvests older than the setting have bfloat16."""
    return facts["config"].get("storage", "bfloat16")


def row_arrays(facts: Mapping[str, Any]) -> dict[str, RowArray]:
    """The arrays [row, ...] of a store, by name."""
    found = {ROW_TOKEN: RowArray("int64", ())}
    for site, width in facts["sites"].items():
        found |= site_arrays(site, width, storage_of(facts))
    return found


def fill_value(array: str, dtype: Any) -> Any:
    """What stands where an array of this dtype has no value."""
    if array in SEQUENCE_ARRAYS:
        return False if SEQUENCE_ARRAYS[array] == "bool" else -1
    return FILLS[str(dtype)]


def create_arrays(path: Path, facts: Mapping[str, Any]) -> None:
    """An empty Zarr group with every array of the store."""
    import zarr
    from zarr.codecs import Crc32cCodec

    context, chunk_rows = facts["config"]["context"], facts["chunk_rows"]
    per_window = facts["sequences_per_window"]
    group = zarr.create_group(path, zarr_format=3)

    def create(name: str, tail: tuple[int, ...], chunk: int, dtype: str, **attributes: Any) -> None:
        group.create_array(
            name,
            shape=(0, *tail),
            chunks=(chunk, *tail),
            dtype=dtype,
            fill_value=fill_value(name, dtype),
            compressors=[Crc32cCodec()],
            attributes=attributes,
        )

    # as we write it when it is repaired
    write_json(path / METADATA, read_json(path / METADATA))
    for name, dtype in SEQUENCE_ARRAYS.items():
        create(name, () if name == "split" else (context,), per_window, dtype)
    for name, array in row_arrays(facts).items():
        create(name, array.tail, chunk_rows, array.dtype, **_attributes(name, array))


def _attributes(name: str, array: RowArray) -> dict[str, str]:
    """What tells other readers of Zarr how an array of rows is to be understood."""
    if array.site is None:
        return {}
    if array.dtype == "uint16":
        return {"bits_of": "bfloat16", "site": array.site}
    if array.dtype == "float32" and name == array.site:
        return {"site": name}
    if name == array.site:
        return {"scaled_by": name + SCALE, "site": name}
    return {"scale_of": array.site}


def described_arrays(group: AnyPath, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Zarr's description of each array of a group, as if it were empty; "" is the group's own."""
    found = {name: read_json(group / name / METADATA) for name in array_names(facts)}
    empty = {name: with_length(described, 0) for name, described in found.items()}
    return {"": read_json(group / METADATA), **empty}


def with_length(described: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Zarr's description of an array with this length along the first axis."""
    return {**described, "shape": [length, *described["shape"][1:]]}


def expected_arrays(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a new group: for stores whose manifest does not have it."""
    with tempfile.TemporaryDirectory() as folder:
        create_arrays(Path(folder) / GROUP, facts)
        return described_arrays(Path(folder) / GROUP, facts)


def array_names(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of all arrays of a store."""
    return (*SEQUENCE_ARRAYS, *row_arrays(facts))


def checked_split(split: str) -> str:
    """The name of a split, as it is. Raises InputError for another."""
    if split not in SPLITS:
        raise InputError("no such split", where="split", given=split, allowed=SPLITS)
    return split
