"""Batches for training: chunks in random order, rows mixed over a few, exactly resumable."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar, cast, overload

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from activations.zarr_store import ActivationStore, Chunk
from saescope.errors import InputError, check_range

BatchT = TypeVar("BatchT", covariant=True)
"""A tensor [batch, d_in] for one site by its name, a tuple of them for several."""


class ActivationLoader(Generic[BatchT]):
    """Iterate over shuffled batches [batch, d_in] in float32 of one site of a store, or of several.

    Whole chunks are read in a random order, different in each epoch, and the rows of `mix_chunks`
    of them are shuffled together; batches run across the borders of chunks. `epochs` None goes on
    for ever. After the last batch the loader stands at the beginning again. `with_rows` also
    tells where each row comes from.

    One site's name gives a tensor a batch. A sequence of names gives a tuple of tensors, one a
    site in the order given, of the very same rows; their widths may differ. The order of rows
    depends on seed and settings alone, not on the sites.

    Raises InputError for an unknown, repeated or missing site, an unknown split, or a split smaller
    than a batch.

    >>> loader = ActivationLoader(store, site, batch_size=4096, epochs=3)  # doctest: +SKIP
    >>> for x in loader:  # doctest: +SKIP
    ...     step(x)
    >>> loader = ActivationLoader(store, [early, late], batch_size=4096)  # doctest: +SKIP
    >>> for x_early, x_late in loader:  # doctest: +SKIP
    ...     step(x_early, x_late)
    """

    @overload
    def __init__(
        self: "ActivationLoader[Tensor]",
        store: ActivationStore,
        sites: str,
        *,
        batch_size: int,
        split: str = ...,
        seed: int = ...,
        epochs: int | None = ...,
        drop_last: bool = ...,
        mix_chunks: int = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: "ActivationLoader[tuple[Tensor, ...]]",
        store: ActivationStore,
        sites: Sequence[str],
        *,
        batch_size: int,
        split: str = ...,
        seed: int = ...,
        epochs: int | None = ...,
        drop_last: bool = ...,
        mix_chunks: int = ...,
    ) -> None: ...
    def __init__(
        self,
        store: ActivationStore,
        sites: str | Sequence[str],
        *,
        batch_size: int,
        split: str = "train",
        seed: int = 0,
        epochs: int | None = None,
        drop_last: bool = True,
        mix_chunks: int = 4,
    ) -> None:
        check_range("batch_size", batch_size, low=1)
        check_range("mix_chunks", mix_chunks, low=1)
        check_range("seed", seed, low=0)
        if epochs is not None:
            check_range("epochs", epochs, low=1)
        self.sites = _checked_sites(store, sites)
        self.widths = tuple(store.d_in(site) for site in self.sites)
        self._alone = isinstance(sites, str)
        self._chunks = store.chunks(split)
        self._rows = store.n_rows(split)
        if self._rows < (batch_size if drop_last else 1):
            raise InputError(
                f"the {split} split of {self.sites[0]} has only {self._rows} rows",
                where="batch_size", given=batch_size, allowed=f"1 to {self._rows}",
            )  # fmt: skip
        self.batch_size = batch_size
        self.epochs = epochs
        self._store = store
        self._drop_last, self._mix = drop_last, mix_chunks
        self._identity = {
            "harvest": store.hash,
            "site": sites if isinstance(sites, str) else list(sites),
            "split": split,
            "seed": seed,
            "batch_size": batch_size,
            "mix_chunks": mix_chunks,
            "drop_last": drop_last,
        }
        self._seed = seed
        self._epoch = self._batch = 0

    @property
    def d_in(self) -> int:
        """Width of the site; of several, the sum of their widths."""
        return sum(self.widths)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one pass over the split."""
        whole, rest = divmod(self._rows, self.batch_size)
        return whole + bool(rest and not self._drop_last)

    def __len__(self) -> int:
        if self.epochs is None:
            raise TypeError("a loader without epochs has no length")
        return self.batches_per_epoch * self.epochs

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: JSON-able, a few numbers."""
        return {**self._identity, "epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch at which `state_dict` was taken.

        Raises InputError if the state is of another store, site or setting.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise InputError(
                    f"the state of another loader: {name} differs", where="load_state_dict",
                    given=state.get(name), allowed=str(value),
                )  # fmt: skip
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def __iter__(self) -> Iterator[BatchT]:
        return (x for x, _ in self.with_rows())

    def with_rows(self) -> Iterator[tuple[BatchT, Int64[Tensor, " batch"]]]:
        """The same batches, each with the flat token index (row_token) of its rows."""
        while self.epochs is None or self._epoch < self.epochs:
            for bits, row_token in self._epoch_batches(self._epoch, self._batch):
                # moved before the batch is handed out: a state taken now goes on after it
                self._batch += 1
                if self._batch == self.batches_per_epoch:
                    self._epoch, self._batch = self._epoch + 1, 0
                x = tuple(torch.from_numpy(part).view(torch.bfloat16).float() for part in bits)
                yield cast(BatchT, x[0] if self._alone else x), torch.from_numpy(row_token)
        self._epoch = self._batch = 0

    def _epoch_batches(self, epoch: int, first: int) -> Iterator[tuple[list[NDArray], NDArray]]:
        """Batches of one epoch from number `first` on: a site's bits [n, d_in]; row_token [n]."""
        skip = first * self.batch_size
        left = self.batches_per_epoch - first
        waiting: list[list[NDArray]] = []
        n_waiting = 0
        for arrays, order in self._groups(epoch, skip):
            start = 0
            while start < len(order):
                part = order[start : start + self.batch_size - n_waiting]
                start += len(part)
                n_waiting += len(part)
                waiting.append([np.take(array, part, axis=0, mode="clip") for array in arrays])
                if n_waiting == self.batch_size:
                    yield _joined(waiting)
                    waiting, n_waiting, left = [], 0, left - 1
                    if left == 0:
                        return
        if waiting and left:
            yield _joined(waiting)

    def _groups(self, epoch: int, skip: int) -> Iterator[tuple[list[NDArray], NDArray]]:
        """Arrays of a few chunks at a time and the order to take rows in; `skip` rows left out.

        Groups that are skipped whole are not read.
        """
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._chunks))
        for group, start in enumerate(range(0, len(order), self._mix)):
            chunks = [self._chunks[n] for n in order[start : start + self._mix]]
            rows = sum(chunk.rows for chunk in chunks)
            if skip >= rows:
                skip -= rows
                continue
            arrays = self._read(chunks, rows)
            shuffled = np.random.default_rng((self._seed, epoch, group)).permutation(rows)
            yield arrays, shuffled[skip:]
            skip = 0

    def _read(self, chunks: list[Chunk], rows: int) -> list[NDArray]:
        """The bits [rows, d_in] of each site, and last the row_token [rows]."""
        bits: list[NDArray] = [np.empty((rows, width), np.uint16) for width in self.widths]
        row_token = np.empty(rows, np.int64)
        start = 0
        for chunk in chunks:
            part = slice(start, start + chunk.rows)
            for site, filled in zip(self.sites, bits, strict=True):
                x, where = self._store.read_chunk(site, chunk.index)
                filled[part] = x.view(torch.uint16).numpy()
                row_token[part] = where.numpy()
            start += chunk.rows
        return [*bits, row_token]


def _joined(parts: list[list[NDArray]]) -> tuple[list[NDArray], NDArray]:
    """Pieces of one batch, each [*bits, row_token], as the bits of each site and the row_token."""
    if len(parts) == 1:
        *bits, row_token = parts[0]
    else:
        *bits, row_token = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    return bits, row_token


def _checked_sites(store: ActivationStore, sites: str | Sequence[str]) -> tuple[str, ...]:
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    for name in names:
        store.d_in(name)
    if not names or len(set(names)) < len(names):
        raise InputError(
            "name at least one site, and each once", where="sites", given=names,
            allowed=store.sites,
        )  # fmt: skip
    return names


def aligned_rows(
    store: ActivationStore,
    sites: Sequence[str],
    *,
    split: str,
    limit: int | None = None,
    piece: int = 16384,
    spread: bool = False,
) -> Iterator[tuple[tuple[Float[Tensor, "rows d_in"], ...], Int64[Tensor, " rows"]]]:
    """Pieces of the rows of a split at several sites, unshuffled, each row once, in float32.

    A piece is a tensor [rows, d_in] a site, of the very same rows, and their row_token; it has at
    most `piece` rows, and does not run across the border of a chunk. With `limit`, that many rows:
    the first of the split, or (`spread`) an equal share of up to 16 chunks all over it. Rows are
    shuffled within a window when they are written, so such a share is a fair sample.

    Raises InputError for an unknown, repeated or missing site or an unknown split.

    >>> for (x,), row_token in aligned_rows(store, [site], split="held_out"):  # doctest: +SKIP
    ...     measure(x)
    """
    names = _checked_sites(store, sites)
    check_range("piece", piece, low=1)
    chunks = store.chunks(split)
    wanted = store.n_rows(split) if limit is None else min(limit, store.n_rows(split))
    for chunk, rows in zip(chunks, _shares(chunks, wanted, spread), strict=True):
        if rows == 0:
            continue
        read = [store.read_chunk(name, chunk.index) for name in names]
        for start in range(0, rows, piece):
            part = slice(start, min(start + piece, rows))
            yield tuple(x[part].float() for x, _ in read), read[0][1][part]


def _shares(chunks: Sequence[Chunk], wanted: int, spread: bool) -> list[int]:
    """Rows to take of each chunk, `wanted` in all."""
    shares = [0] * len(chunks)
    rounds: list[tuple[Sequence[int], int]] = [(range(len(chunks)), wanted)]
    if spread and chunks:
        count = min(16, len(chunks))
        picked = [n * len(chunks) // count for n in range(count)]
        # the round behind makes up for chunks that are too short for their share
        rounds.insert(0, (picked, -(-wanted // count)))
    for numbers, most in rounds:
        for n in numbers:
            rows = min(wanted, most, chunks[n].rows - shares[n])
            shares[n] += rows
            wanted -= rows
    return shares
