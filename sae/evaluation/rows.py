"""One pass of an SAE over held-out rows, shared by all families of metrics that need no model.

A family of this kind is a subclass of `RowSums`: it adds up what it needs of every few thousand
rows, already encoded and decoded, and turns the sums into values at the end.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sae.core.finite import check_rows
from sae.distributed import ROWS
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError
from saescope.progress import Progress, silent

_ROWS = 4096


class Coder(Protocol):
    """What encodes rows and decodes them again."""

    def encode_sparse(self, x: Tensor) -> SparseCodes: ...
    def decode(self, codes: SparseCodes, like: Tensor) -> Tensor: ...


class Reconstructor(Coder, Protocol):
    """What can be measured: an SAE, or a stand-in such as the identity."""

    d_sae: int


class Piece(NamedTuple):
    """Rows, and which document each is of."""

    x: Tensor
    """[rows, d_in]"""
    target: Tensor
    """[rows, d_out], what is to be reconstructed; x itself but for transcoders"""
    document: Tensor | None = None
    """int64 [rows]"""
    position: Tensor | None = None
    """int64 [rows], of each row's token in its sequence; None where rows are not of tokens"""
    token_share: Tensor | None = None
    """float64 [rows], the part of the harvest's tokens that are this row's token"""

    def rows(self, chosen: slice | Tensor) -> "Piece":
        """Some of the rows: a slice of them, or those where `chosen` bool [rows] is true."""
        x = self.x[chosen]
        about = (None if each is None else each[chosen] for each in self[2:])
        return Piece(x, x if self.target is self.x else self.target[chosen], *about)


Rows = Tensor | tuple[Tensor, Tensor] | Piece
"""x [rows, d_in], or it and what it is to predict [rows, d_out], or these with their documents"""


class EncodedRows(NamedTuple):
    """Rows, and what an SAE makes of them."""

    codes: SparseCodes
    """features of [rows, d_sae]"""
    target: Tensor
    """float64 [rows, d_out]"""
    x_hat: Tensor
    """float64 [rows, d_out], the reconstruction"""
    given: Piece
    """the rows as they came, with what is known of them"""


def encoded(sae: Coder, given: Piece) -> EncodedRows:
    """Rows, encoded, and decoded beside their target."""
    codes = sae.encode_sparse(given.x).compact()
    x_hat = sae.decode(codes, like=given.x)
    return EncodedRows(codes, given.target.double(), x_hat.double(), given)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known before the rows are encoded."""

    d_sae: int
    """number of features"""
    mean: Tensor
    """float64 [d_out], mean of the target over all rows"""
    columns: Mapping[str, slice] = field(default_factory=dict)
    """where each site stands in the target, of an SAE that reconstructs several side by side"""
    sae: Reconstructor | None = None
    """what is measured, for what is said of its weights"""
    quick: bool = False
    """whether a family looks at fewer rows, where it chooses how many (`Family.quick`)"""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How many rows were measured."""

    rows: int
    """number of rows, of all ranks"""
    document: Tensor | None
    """int64 [rows], each row's document; None where that is not known, and rows count as
    independent"""

    @property
    def documents(self) -> int | None:
        """Number of documents; None where they are not known."""
        return None if self.document is None else len(self.document.unique())


class RowSums(ABC):
    """Sums over rows, of which a family's values are made.

    With several ranks each adds its own rows: `values` sums over them (`sae.distributed.ROWS`).
    """

    training_rows: int = 0
    """how many rows of the training split `fit` is shown; 0: it is not called"""
    readings: ClassVar[int] = 1
    """how often `fit` reads them"""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def fit(self, training: Callable[[], Iterator[EncodedRows]]) -> None:
        """Learn from rows of the training split, given as fresh iterators, before any `add`."""
        del training

    @abstractmethod
    def add(self, rows: EncodedRows) -> None:
        """Add some rows, one or more."""

    @abstractmethod
    def values(self, counted: Counted) -> dict[str, Any]:
        """The values by name. A tensor is for `pool` and is not written to evaluation.json."""

    @classmethod
    def pool(cls, sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Values of one SAE at several layers, from each site's: the mean of each number.

        None where a site has none. The mean of intervals is that of layers that err together, as
        those of the same tokens may.

        >>> RowSums.pool({"a": {"fvu": 0.5, "kl": None}, "b": {"fvu": 0.25, "kl": 1.0}})
        {'fvu': 0.375, 'kl': None}
        """
        each = list(sites.values())
        names = [n for n, v in each[0].items() if v is None or isinstance(v, int | float)]
        found = {name: [one[name] for one in each] for name in names}
        return {
            name: None if None in values else sum(values) / len(each)
            for name, values in found.items()
        }


@torch.no_grad()
def pass_over(
    sae: Reconstructor,
    rows: Callable[[], Iterable[Rows]],
    families: Sequence[type[RowSums]],
    columns: Mapping[str, slice] | None = None,
    training: Callable[[int], Callable[[], Iterable[Rows]]] | None = None,
    *,
    quick: bool = False,
    shown: bool = False,
) -> tuple[Counted, list[RowSums]]:
    """Show all rows to all families; `rows` gives fresh iterators, and is read twice.

    The first reading is for the mean. Sums are float64, so that neither the size of pieces nor a
    large mean matters.

    Args:
        training: gives, of a number of rows, that many of the training split, for families that
            learn from them.
        quick: see `Setting`.
        shown: whether progress is.

    Raises InputError if there are no rows, some are not finite, or training rows are needed and
    not given.
    """
    count, total = 0, torch.zeros((), dtype=torch.float64)
    for each in rows():
        target = _piece(each).target
        check_rows(target, "measure_reconstruction")
        count += len(target)
        total = total + target.sum(0, dtype=torch.float64)
    if count == 0:
        raise InputError("no activations to evaluate on", where="measure_reconstruction", given=0)
    setting = Setting(
        d_sae=sae.d_sae, mean=total / count, columns=columns or {}, sae=sae, quick=quick
    )
    sums = [family(setting) for family in families]
    with nullcontext() if shown else silent():
        for one in sums:
            if one.training_rows:
                _fit(sae, one, training)
        counter = _Counter(total.device)
        with Progress("measuring activations", count // ROWS.size, "rows") as progress:
            for own in _own(rows()):
                counter.add(own)
                if len(own.x):
                    codes = encoded(sae, own)
                    for one in sums:
                        one.add(codes)
                progress.advance(len(own.x))
    return counter.result(), sums


def _fit(
    sae: Reconstructor,
    one: RowSums,
    training: Callable[[int], Callable[[], Iterable[Rows]]] | None,
) -> None:
    if training is None:
        raise InputError("needs rows of the training split", where=type(one).__name__, given=None)
    split = training(one.training_rows)
    count = one.readings * sum(len(own.x) for own in _own(split()))
    with Progress(f"fitting {type(one).__name__} on training rows", count, "rows") as progress:

        def reading() -> Iterator[EncodedRows]:
            for own in _own(split()):
                if len(own.x):
                    yield encoded(sae, own)
                    progress.advance(len(own.x))

        one.fit(reading)


def _own(rows: Iterable[Rows]) -> Iterator[Piece]:
    """A few thousand rows at a time; of several ranks, which measure together, this one's share."""
    for each in rows:
        piece = _piece(each)
        for start in range(0, len(piece.x), _ROWS):
            part = piece.rows(slice(start, start + _ROWS))
            yield part.rows(ROWS.share(len(part.x)))


class _Counter:
    """Rows, and the documents they are of."""

    def __init__(self, device: torch.device) -> None:
        self.rows = 0
        self.documents = [torch.zeros(0, dtype=torch.int64, device=device)]
        self.documented = True

    def add(self, piece: Piece) -> None:
        self.rows += len(piece.x)
        self.documented &= piece.document is not None
        if piece.document is not None:
            self.documents.append(piece.document.to(self.documents[0]))

    def result(self) -> Counted:
        document = ROWS.gather(torch.cat(self.documents)) if self.documented else None
        return Counted(rows=ROWS.total(self.rows), document=document)


def _piece(rows: Rows) -> Piece:
    if isinstance(rows, Piece):
        return rows
    x, target = (rows, rows) if isinstance(rows, Tensor) else rows
    return Piece(x, target)
