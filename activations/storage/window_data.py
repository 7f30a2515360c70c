"""What a harvest hands to the writer of a store: one window, its rows in memory or in files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.storage.layout import ROW_TOKEN, fill_value
from activations.storage.ledger import Window
from activations.storage.row_formats import SiteSums
from saescope.paths import AnyPath


@dataclass(frozen=True)
class StagedRows:
    """Rows of a window that are in files already, in the order in which they are to be."""

    folder: AnyPath
    """its chunks, counted from 0, lie in it as they do in the Zarr group"""
    crcs: Mapping[str, list[int]]
    """of the chunks of each array [row, ...], by name"""


@dataclass(frozen=True)
class WindowData:
    """A window's content, rows already shuffled."""

    split: str
    tokens: NDArray[np.int32]
    document: NDArray[np.int32]
    keep: NDArray[np.bool_]
    described: Sequence[tuple[Any, ...]]
    """(id, key, title) of the documents that first appear here; with their number, where the store
    tells texts apart."""
    row_token: NDArray[np.int64]
    rows: Mapping[str, NDArray[Any]]
    """The arrays [row, ...] of all sites, by name (row_storage.site_arrays)."""
    order: NDArray[np.int64]
    """The shuffled order in which the rows are written."""
    sums: Mapping[str, SiteSums]
    """Of each site; empty in a window that statistics are not of."""
    positions: Mapping[str, int] = field(default_factory=dict)
    """How many positions are kept, and how many are left out for each reason."""
    cursor: Mapping[str, Any] | None = None
    """Where in the corpus to go on from, to read this window again and what follows it."""
    staged: StagedRows | None = None
    """Where its rows are, if not in `rows` and `row_token`."""

    def chunks(self, chunk_rows: int) -> Iterator[tuple[int, str, NDArray[Any]]]:
        """(number, array, values) of each chunk of the arrays [row, ...], in the order written."""
        for number, start in enumerate(range(0, len(self.order), chunk_rows)):
            order = self.order[start : start + chunk_rows]
            for name, values in {ROW_TOKEN: self.row_token, **self.rows}.items():
                yield number, name, np.take(values, order, axis=0, mode="clip")


def filled_up(array: str, values: NDArray[Any], length: int) -> NDArray[Any]:
    """The values of a chunk of `length` along the first axis, filled up where there are fewer."""
    if len(values) == length:
        return values
    whole = np.full((length, *values.shape[1:]), fill_value(array, values.dtype), values.dtype)
    whole[: len(values)] = values
    return whole


def dealt(
    data: WindowData, window: Window, array: str, chunk: int, chunk_rows: int
) -> NDArray[Any]:
    """What a chunk of an array [row, ...] has of a window, filled up where its rows end."""
    values = data.row_token if array == ROW_TOKEN else data.rows[array]
    start = (chunk - window.first_chunk) * chunk_rows
    order = data.order[start : start + chunk_rows]
    return filled_up(array, np.take(values, order, axis=0, mode="clip"), chunk_rows)
