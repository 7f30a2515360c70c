"""What lies where in a store, and how Zarr describes it."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from saescope.artefact import read_json, write_json

GROUP, DOCUMENTS, METADATA = "activations.zarr", "documents.parquet", "zarr.json"
SPLITS = ("train", "held_out")
NAN_BITS = 0x7FC0
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


def row_arrays(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the arrays [row, ...] of a store."""
    return (ROW_TOKEN, *facts["sites"])


def fill_value(array: str) -> Any:
    """What stands where an array has no value."""
    if array in SEQUENCE_ARRAYS:
        return False if SEQUENCE_ARRAYS[array] == "bool" else -1
    return -1 if array == ROW_TOKEN else NAN_BITS


def create_arrays(path: Path, facts: Mapping[str, Any]) -> None:
    """An empty Zarr group with every array of the store."""
    import zarr
    from zarr.codecs import Crc32cCodec

    context, chunk_rows = facts["config"]["context"], facts["chunk_rows"]
    per_window = facts["sequences_per_window"]
    group = zarr.create_group(path, zarr_format=3)

    def create(name: str, width: int | None, chunk: int, dtype: str, **attributes: Any) -> None:
        tail = () if width is None else (width,)
        group.create_array(
            name, shape=(0, *tail), chunks=(chunk, *tail), dtype=dtype,
            fill_value=fill_value(name), compressors=[Crc32cCodec()], attributes=attributes,
        )  # fmt: skip

    # as we write it when it is repaired
    write_json(path / METADATA, read_json(path / METADATA))
    for name, dtype in SEQUENCE_ARRAYS.items():
        create(name, None if name == "split" else context, per_window, dtype)
    create(ROW_TOKEN, None, chunk_rows, "int64")
    for site, width in facts["sites"].items():
        create(site, width, chunk_rows, "uint16", bits_of="bfloat16", site=site)


def described_arrays(group: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
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
