"""Stream, the base of all streams: batches of a harvest's rows, an exact state, held-out rows."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from activations import ActivationLoader, ActivationStore, SiteStatistics
from activations.loading.epoch_order import Order
from activations.loading.outliers import OutlierFilter
from activations.loading.unshuffled import aligned_rows
from sae.core.batch import RawBatch
from sae.data.row_labels import Labels, RowLabels
from saescope.errors import InputError, check_range

_HELD_OUT_ROWS = 16384


class RowTransform(Protocol):
    """A change of a site's rows before an SAE sees them, such as a tuned lens."""

    @property
    def hash(self) -> str:
        """What identifies it."""
        ...

    def apply(self, site: str, x: Tensor) -> Tensor:
        """Rows [n, d_in] of a site, changed; same shape."""
        ...


class Stream(ABC):
    """Batches of a harvest's training rows, and its held-out rows in the same form.

    Args:
        store: the harvest.
        sites: names of the sites that are read, in order; `group` counts in them.
        batch_size: rows of x in a batch. Outliers are taken out of it: where there are any, a batch
            is so much smaller, and one of nothing else is left out.
        seed: decides the order of the tokens.
        mix_chunks: chunks whose rows are shuffled together; twice so many of every site are in
            memory.
        labels: "document" for the document of each row, "neighbours" for tokens' numbers, by which
            neighbours are known and which are then read two by two, or int64 labels [sequence] or
            [sequence, position] of the harvest; None for no labels.
        outliers: which rows to leave out, of training and held-out rows alike.
        transform: what is done to each site's rows (after outliers are found).
        order: spread, chunks or windows; activations.loading.epoch_order says what each is.
        device: where the rows of batches are put as soon as they can be.

    Raises InputError for an unknown, repeated or missing site, or fewer rows than a batch.
    """

    KIND: ClassVar[str]

    def __init__(
        self,
        store: ActivationStore,
        sites: Sequence[str],
        *,
        batch_size: int,
        seed: int = 0,
        mix_chunks: int = 4,
        labels: Labels | None = None,
        outliers: OutlierFilter | None = None,
        transform: RowTransform | None = None,
        order: Order | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_range("batch_size", batch_size, low=1)
        self.store = store
        self.sites = tuple(sites)
        self.batch_size = batch_size
        self.outliers, self.transform = outliers, transform
        self.removed = 0
        self._labels = RowLabels(store, labels) if labels is not None else None
        self._number, self._seed = 0, seed
        self.tokens_per_batch = self._tokens_of(batch_size)
        self._loader = ActivationLoader(
            store,
            self.sites,
            batch_size=self.tokens_per_batch,
            seed=seed,
            mix_chunks=mix_chunks,
            # outliers and transforms are worked out on the CPU
            order=order,
            device="cpu" if outliers or transform else device,
            neighbours=isinstance(labels, str) and labels == "neighbours",
        )

    @property
    def d_in(self) -> int:
        """Width of x."""
        return self._loader.widths[0]

    @property
    def d_out(self) -> int:
        """Width of the target; d_in where the target is x."""
        return self.d_in

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one pass over the training tokens."""
        return self._loader.batches_per_epoch

    def __iter__(self) -> Iterator[RawBatch]:
        for by_site, row_token in self._loader.with_rows():
            number, self._number = self._number, self._number + 1
            batch, removed = self._finished(by_site, row_token, number)
            self.removed += removed
            if len(batch):
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and how many outlier rows it has left out; JSON-able."""
        return {
            **self._identity(),
            "loader": self._loader.state_dict(),
            "number": self._number,
            "removed": self.removed,
            "outliers": self.outliers.to_dict() if self.outliers else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch at which `state_dict` was taken, with its outlier medians.

        Raises InputError if the state is of another stream.
        """
        found, own = state.get("outliers"), self.outliers
        limits = found and found["multiple"], own and own.multiple
        expected = {**self._identity(), "outliers": limits[1]}
        for name, value in expected.items():
            given = limits[0] if name == "outliers" else state.get(name)
            if given != value:
                raise InputError(
                    f"the state of another stream: {name} differs",
                    where="load_state_dict",
                    given=given,
                    allowed=str(value),
                )
        self._loader.load_state_dict(state["loader"])
        self._number, self.removed = int(state["number"]), int(state["removed"])
        if found:
            self.outliers = OutlierFilter(**found)

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": self.KIND,
            "batch_size": self.batch_size,
            "labels": self._labels.hash if self._labels else None,
            "transform": self.transform.hash if self.transform else None,
        }

    def held_out(self, rows: int | None = None) -> "HeldOut":
        """Held-out batches of the same form; `rows` limits the tokens (None: all).

        AllLayers and DrawnLayer give every layer's row of each of these tokens, with its group.
        Raises InputError if the harvest has no held-out rows.
        """
        return HeldOut(self, rows)

    def fitting_rows(self, site: str, rows: int) -> Iterator[Float[Tensor, "rows d_in"]]:
        """About `rows` training rows of a site from all over the store, as an SAE would see them.

        Outliers are left out, the transform is applied; nothing of the stream's state changes.
        """
        pieces = aligned_rows(self.store, [site], split="train", limit=rows, spread=True)
        for (x,), _ in pieces:
            kept = x if self.outliers is None else x[self.outliers.keep(site, x)]
            yield self.transform.apply(site, kept) if self.transform else kept

    def statistics(self, site: str, *, rows: int = 131_072) -> SiteStatistics:
        """Moments of a site's training rows, as an SAE would see them, for a normaliser.

        Without outlier filter and transform, the harvest's own, over all rows; else over about
        `rows` of them, in float64. Raises InputError for an unknown site.
        """
        if self.outliers is None and self.transform is None:
            return self.store.statistics(site)
        count, square = 0, 0.0
        total = torch.zeros(self.store.d_in(site), dtype=torch.float64)
        for x in self.fitting_rows(site, rows):
            count += len(x)
            total += x.sum(0, dtype=torch.float64)
            square += float(x.double().square().sum())
        if count == 0:
            raise InputError("nothing but outliers", where=site, given=self.outliers)
        return SiteStatistics(count, (total / count).numpy(), square / count)

    def _tokens_of(self, rows: int) -> int:
        """Tokens that give a batch of so many rows."""
        return rows

    def _finished(
        self, by_site: Sequence[Tensor], row_token: Tensor, number: int | None
    ) -> tuple[RawBatch, int]:
        """The batch that tokens give, and how many outlier rows are left out of it.

        Args: number is the batch's, counted from the first; None for held-out tokens.
        """
        names, keep = self._loader.sites, None
        if self.outliers is not None:
            keep = [self.outliers.keep(site, x) for site, x in zip(names, by_site, strict=True)]
        if self.transform is not None:
            by_site = [
                self.transform.apply(site, x) for site, x in zip(names, by_site, strict=True)
            ]
        batch, whole = self._rows(Tokens(by_site, keep, row_token, number))
        removed = 0
        if whole is not None and not bool(whole.all()):
            removed = int((~whole).sum())
            batch = batch.select(whole)
        if self._labels is not None and batch.row_token is not None:
            batch = replace(batch, labels=self._labels.of(batch.row_token))
        return batch, removed

    @abstractmethod
    def _rows(self, tokens: "Tokens") -> tuple[RawBatch, Tensor | None]:
        """The rows that tokens give; which of them are no outliers (None: all)."""


class Tokens(NamedTuple):
    """Tokens as they come from the loader, seen at every site."""

    by_site: Sequence[Tensor]
    """[tokens, d_in] of each site"""
    keep: Sequence[Tensor] | None
    """bool [tokens] of each site: no outlier"""
    row_token: Tensor
    number: int | None

    @property
    def keep_everywhere(self) -> Tensor | None:
        """Tokens that are no outlier at any site, bool [tokens]."""
        return None if self.keep is None else torch.stack(tuple(self.keep)).all(0)


class HeldOut:
    """Fresh iterators over a stream's held-out rows.

    >>> rows = stream.held_out(8192)  # doctest: +SKIP
    >>> sum(len(batch) for batch in rows())  # doctest: +SKIP
    8192
    """

    def __init__(self, stream: Stream, rows: int | None) -> None:
        if rows is not None:
            check_range("held-out rows", rows, low=1)
        if stream.store.n_rows("held_out") == 0:
            raise InputError("no held-out rows to evaluate on", where=str(stream.store.path))
        self._stream, self._rows = stream, rows
        self.removed = 0
        """Outlier rows left out by the last iterator."""

    def __call__(self) -> Iterator[RawBatch]:
        stream = self._stream
        self.removed = 0
        pieces = aligned_rows(
            stream.store,
            stream._loader.sites,
            split="held_out",
            limit=self._rows,
            piece=max(1, _HELD_OUT_ROWS // len(stream.sites)),
        )
        for by_site, row_token in pieces:
            batch, removed = stream._finished(by_site, row_token, None)
            self.removed += removed
            if len(batch):
                yield batch
