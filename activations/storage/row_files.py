"""Files of activations that somebody else made: .npy, safetensors, Parquet, Zarr.

None is read whole, and none is executed: no pickle. Arrays by name; a file that has names (all but
.npy) may hold, besides rows of sites, `tokens`, `documents` and `keep` (see
`ActivationStore.from_arrays`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations.storage.arrays import Rows, RowsInMemory, as_column
from saescope.errors import ArtefactError, InputError

COLUMNS = ("tokens", "documents", "keep")


class Brought(NamedTuple):
    """What a file has."""

    rows: dict[str, Rows]
    """by the name of the site"""
    columns: dict[str, NDArray[Any]]
    """of `COLUMNS`, those that it has"""


def open_rows(path: str | Path, sites: Sequence[str] = ()) -> Brought:
    """The arrays of a file: those of these names, or all that are rows.

    Args: sites: of a .npy file, whose array has no name, the name to give it.

    Raises InputError for a file of another kind, or names that it has not; ArtefactError if it is
    missing or damaged.
    """
    file = Path(path)
    kind = _KINDS.get(file.suffix.lower())
    if kind is None:
        raise InputError(
            "no file of activations that is known", where=str(path), allowed=tuple(_KINDS)
        )
    if not file.exists():
        raise ArtefactError("no such file", where=str(path))
    try:
        found = kind(file, sites)
    except (InputError, ArtefactError):
        raise
    except Exception as error:  # each library has errors of its own for files that are damaged
        raise ArtefactError(f"cannot be read: {error}", where=str(path)) from error
    missing = [name for name in sites if name not in found.rows]
    if missing:
        raise InputError(
            "the file has no such rows",
            where=str(path),
            given=", ".join(missing),
            allowed=tuple(found.rows),
        )
    if not found.rows:
        raise InputError("has no rows of activations", where=str(path))
    chosen = {name: found.rows[name] for name in sites or found.rows}
    return Brought(chosen, found.columns)


def read_column(path: str | Path, name: str) -> NDArray[Any]:
    """A .npy file of token ids, documents or truth values. Errors as of `open_rows`."""
    try:
        return as_column(np.load(Path(path), mmap_mode="r", allow_pickle=False), where=str(path))
    except FileNotFoundError:
        raise ArtefactError("no such file", where=str(path)) from None
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise ArtefactError(f"{name} cannot be read: {error}", where=str(path)) from error


def _npy(file: Path, sites: Sequence[str]) -> Brought:
    values = np.load(file, mmap_mode="r", allow_pickle=False)
    if len(sites) > 1:
        raise InputError("a .npy file has one array", where=str(file), given=tuple(sites))
    name = sites[0] if sites else file.stem
    return Brought({name: RowsInMemory(values, where=str(file))}, {})


class _SafetensorsRows(Rows):
    def __init__(self, file: Path, name: str, shape: Sequence[int], dtype: str) -> None:
        self._file, self._name = file, name
        self.where, self.shape, self.dtype = f"{file}, {name}", tuple(shape), dtype

    def read(self, start: int, stop: int) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._file, framework="pt") as opened:
            return opened.get_slice(self._name)[start:stop]


_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def _safetensors(file: Path, sites: Sequence[str]) -> Brought:
    from safetensors import safe_open

    rows, columns = {}, {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            part = opened.get_slice(name)
            if name in COLUMNS:
                columns[name] = as_column(opened.get_tensor(name), where=f"{file}, {name}")
            elif part.get_dtype() in _SAFETENSORS:
                dtype = _SAFETENSORS[part.get_dtype()]
                rows[name] = _SafetensorsRows(file, name, part.get_shape(), dtype)
    return Brought(rows, columns)


class _ParquetRows(Rows):
    """A column of lists of numbers; one row group is in memory at a time."""

    def __init__(self, file: Path, name: str, dtype: str) -> None:
        from pyarrow import parquet

        self._name, self.dtype, self.where = name, dtype, f"{file}, {name}"
        self._file = parquet.ParquetFile(file)
        groups = self._file.metadata
        counts = [groups.row_group(n).num_rows for n in range(groups.num_row_groups)]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._held: tuple[int, Tensor] | None = None
        width = self._group(0).shape[1] if counts else 0
        self.shape = (int(self._first[-1]), width)

    def read(self, start: int, stop: int) -> Tensor:
        first = int(np.searchsorted(self._first, start, side="right")) - 1
        parts = []
        for number in range(first, len(self._first) - 1):
            begin = int(self._first[number])
            if begin >= stop:
                break
            parts.append(self._group(number)[max(0, start - begin) : stop - begin])
        return torch.cat(parts)

    def _group(self, number: int) -> Tensor:
        if self._held is None or self._held[0] != number:
            column = self._file.read_row_group(number, columns=[self._name])[self._name]
            lists = column.combine_chunks()
            lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
            width = self.shape[1] if self._held else int(lengths[0]) if len(lengths) else 0
            values = lists.flatten()
            if lists.null_count or values.null_count or (lengths != width).any():
                begin = int(self._first[number])
                raise InputError(
                    "rows are of one width, without nulls",
                    where=self.where,
                    given=f"a row of the {len(lengths)} from number {begin} on",
                    allowed=f"{width} numbers",
                )
            found = torch.from_numpy(
                values.to_numpy(zero_copy_only=False).reshape(-1, width).copy()
            )
            self._held = (number, found)
        return self._held[1]


def _parquet(file: Path, sites: Sequence[str]) -> Brought:
    import pyarrow as pa
    from pyarrow import parquet

    names = {pa.float32(): "float32", pa.float16(): "float16", pa.float64(): "float64"}
    rows, columns = {}, {}
    for field in parquet.read_schema(file):
        if field.name in COLUMNS:
            values = parquet.read_table(file, columns=[field.name])[field.name]
            if values.null_count:
                raise InputError("has nulls", where=f"{file}, {field.name}")
            columns[field.name] = as_column(
                values.to_numpy().astype(str)
                if pa.types.is_string(field.type)
                else values.to_numpy(),
                where=f"{file}, {field.name}",
            )
        elif pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
            dtype = names.get(field.type.value_type)
            if dtype is not None and (not sites or field.name in sites):
                rows[field.name] = _ParquetRows(file, field.name, dtype)
    return Brought(rows, columns)


class _ZarrRows(Rows):
    def __init__(self, file: Path, name: str, values: Any) -> None:
        self._values, self.where = values, f"{file}, {name}"
        self.shape, self.dtype = tuple(values.shape), str(values.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._values[start:stop]))


def _zarr(file: Path, sites: Sequence[str]) -> Brought:
    import zarr

    opened = zarr.open(file, mode="r")
    if isinstance(opened, zarr.Array):
        _refuse_pickle(opened, str(file))
        name = sites[0] if sites else file.stem
        return Brought({name: _ZarrRows(file, name, opened)}, {})
    rows, columns = {}, {}
    for name, values in sorted(opened.arrays()):
        _refuse_pickle(values, f"{file}, {name}")
        if name in COLUMNS and np.dtype(values.dtype).kind in "biuU":
            columns[name] = as_column(values[:], where=f"{file}, {name}")
        elif np.dtype(values.dtype).kind == "f":
            rows[name] = _ZarrRows(file, name, values)
    return Brought(rows, columns)


def _refuse_pickle(array: Any, where: str) -> None:
    """Zarr knows a codec that is Python's pickle, which executes what it reads."""
    if "pickle" in str(array.metadata.to_dict()).lower():
        raise InputError("is pickled, and could execute anything", where=where)


_KINDS: Mapping[str, Callable[[Path, Sequence[str]], Brought]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
    ".zarr": _zarr,
}
