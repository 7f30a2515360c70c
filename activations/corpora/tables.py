"""Tables of documents in files: Parquet, Arrow, and folders that a data set was saved to."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saescope.errors import InputError

_ROWS = 256
_STATE, _SPLITS = "state.json", "dataset_dict.json"
"""files of a folder that the datasets library saved: of one split, of several"""


def columns_of(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[Any]:
    """Pieces (record batches) of some columns of a file; `choose` picks them from all names.

    Raises InputError if the file is not readable.
    """
    read = _parquet if path.suffix == ".parquet" else _arrow
    yield from read(path, choose)


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a readable {kind} file: {error}", where=str(path)) from error


def _parquet(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[Any]:
    from pyarrow import parquet

    with _reading(path, "Parquet"):
        file = parquet.ParquetFile(path)
    with file:
        batches = file.iter_batches(batch_size=_ROWS, columns=choose(file.schema_arrow.names))
        while True:
            with _reading(path, "Parquet"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _arrow(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[Any]:
    """An Arrow stream (what the datasets library writes) or an Arrow file, not read into memory."""
    import pyarrow as pa

    with _reading(path, "Arrow"), pa.memory_map(str(path)) as source:
        random_access = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if random_access else pa.ipc.open_stream(source)
        wanted = choose(reader.schema.names)
        numbers = range(reader.num_record_batches) if random_access else None
        batches = reader if numbers is None else map(reader.get_batch, numbers)
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                yield batch.slice(start, _ROWS).select(wanted)


def saved_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files, in order, of a data set saved to a folder; of several splits, of that one.

    Raises InputError if there is none there.
    """
    if (folder / _SPLITS).is_file():
        splits = _read(folder / _SPLITS).get("splits", [])
        if split not in splits:
            raise InputError("no such split", where=str(folder), given=split, allowed=splits)
        folder = folder / split
    if not (folder / _STATE).is_file():
        raise InputError(
            "is a folder, and no data set was saved to it",
            where=str(folder),
            allowed="a pattern of files, such as texts/*.jsonl",
        )
    state = _read(folder / _STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise InputError(
            "this data set is a selection of rows: save it after flatten_indices()",
            where=str(folder),
        )
    names = [entry.get("filename") for entry in state.get("_data_files", [])]
    if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise InputError("names no files of its own", where=str(folder / _STATE), given=names)
    return [folder / name for name in names]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=str(path)) from error
    if not isinstance(found, dict):
        raise InputError("not a JSON object", where=str(path), given=type(found).__name__)
    return found
