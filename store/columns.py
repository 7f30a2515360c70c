"""Checks of the columns that a store is written from."""

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from saescope.errors import InputError


def column(name: str, values: ArrayLike, dtype: type) -> np.ndarray:
    """Values as a column of this type; InputError if they are no column of it."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise InputError("must have one dimension", where=name, given=array.shape)
    if np.issubdtype(dtype, np.integer) and array.size and array.dtype.kind not in "iu":
        raise InputError("must be integers", where=name, given=str(array.dtype))
    return np.ascontiguousarray(array, dtype=dtype)


def plain_values(kind: pa.DataType) -> bool:
    """Whether a type is one of numbers, truth values or texts."""
    of = pa.types
    return (
        of.is_integer(kind)
        or of.is_floating(kind)
        or of.is_boolean(kind)
        or of.is_string(kind)
        or of.is_large_string(kind)
    )


def same_length(**columns: np.ndarray) -> None:
    """Raise InputError unless columns are equally long."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError("columns differ in length", given=lengths)


def within(name: str, values: np.ndarray, size: int) -> None:
    """Raise InputError unless all values are from 0 to size - 1."""
    if values.size and (values.min() < 0 or values.max() >= size):
        wrong = values.min() if values.min() < 0 else values.max()
        raise InputError("out of range", where=name, given=int(wrong), allowed=f"0 to {size - 1}")
