"""Batches for training: chunks in random order, rows mixed over a few, exactly resumable."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from activations.zarr_store import ActivationStore, Chunk
from saescope.errors import InputError, check_range


class ActivationLoader:
    """Iterate over shuffled batches [batch, d_in] in float32 of one site of a store.

    Whole chunks are read in a random order, different in each epoch, and the rows of `mix_chunks`
    of them are shuffled together; batches run across the borders of chunks. `epochs` None goes on
    for ever. After the last batch the loader stands at the beginning again. `with_rows` also
    tells where each row comes from.

    Raises InputError for an unknown site or split, or a split smaller than a batch.

    >>> loader = ActivationLoader(store, site, batch_size=4096, epochs=3)  # doctest: +SKIP
    >>> for x in loader:  # doctest: +SKIP
    ...     step(x)
    """

    def __init__(
        self,
        store: ActivationStore,
        site: str,
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
        self.d_in = store.d_in(site)
        self._chunks = store.chunks(split)
        self._rows = store.n_rows(split)
        if self._rows < (batch_size if drop_last else 1):
            raise InputError(
                f"the {split} split of {site} has only {self._rows} rows", where="batch_size",
                given=batch_size, allowed=f"1 to {self._rows}",
            )  # fmt: skip
        self.batch_size = batch_size
        self.epochs = epochs
        self._store, self._site = store, site
        self._drop_last, self._mix = drop_last, mix_chunks
        self._identity = {
            "harvest": store.hash,
            "site": site,
            "split": split,
            "seed": seed,
            "batch_size": batch_size,
            "mix_chunks": mix_chunks,
            "drop_last": drop_last,
        }
        self._seed = seed
        self._epoch = self._batch = 0

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

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        return (x for x, _ in self.with_rows())

    def with_rows(
        self,
    ) -> Iterator[tuple[Float[Tensor, "batch d_in"], Int64[Tensor, " batch"]]]:
        """The same batches, each with the flat token index (row_token) of its rows."""
        while self.epochs is None or self._epoch < self.epochs:
            for bits, row_token in self._epoch_batches(self._epoch, self._batch):
                # moved before the batch is handed out: a state taken now goes on after it
                self._batch += 1
                if self._batch == self.batches_per_epoch:
                    self._epoch, self._batch = self._epoch + 1, 0
                x = torch.from_numpy(bits).view(torch.bfloat16).float()
                yield x, torch.from_numpy(row_token)
        self._epoch = self._batch = 0

    def _epoch_batches(self, epoch: int, first: int) -> Iterator[tuple[NDArray, NDArray]]:
        """Batches of one epoch from number `first` on: bits [n, d_in] and row_token [n]."""
        skip = first * self.batch_size
        left = self.batches_per_epoch - first
        waiting: list[tuple[NDArray, NDArray]] = []
        n_waiting = 0
        for bits, row_token, order in self._groups(epoch, skip):
            start = 0
            while start < len(order):
                part = order[start : start + self.batch_size - n_waiting]
                start += len(part)
                n_waiting += len(part)
                waiting.append((np.take(bits, part, axis=0, mode="clip"), row_token[part]))
                if n_waiting == self.batch_size:
                    yield _joined(waiting)
                    waiting, n_waiting, left = [], 0, left - 1
                    if left == 0:
                        return
        if waiting and left:
            yield _joined(waiting)

    def _groups(self, epoch: int, skip: int) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
        """Rows of a few chunks at a time with the order to take them in; `skip` rows left out.

        Groups that are skipped whole are not read.
        """
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._chunks))
        for group, start in enumerate(range(0, len(order), self._mix)):
            chunks = [self._chunks[n] for n in order[start : start + self._mix]]
            rows = sum(chunk.rows for chunk in chunks)
            if skip >= rows:
                skip -= rows
                continue
            bits, row_token = self._read(chunks, rows)
            shuffled = np.random.default_rng((self._seed, epoch, group)).permutation(rows)
            yield bits, row_token, shuffled[skip:]
            skip = 0

    def _read(self, chunks: list[Chunk], rows: int) -> tuple[NDArray, NDArray]:
        bits = np.empty((rows, self.d_in), np.uint16)
        row_token = np.empty(rows, np.int64)
        start = 0
        for chunk in chunks:
            x, where = self._store.read_chunk(self._site, chunk.index)
            bits[start : start + chunk.rows] = x.view(torch.uint16).numpy()
            row_token[start : start + chunk.rows] = where.numpy()
            start += chunk.rows
        return bits, row_token


def _joined(parts: list[tuple[NDArray, NDArray]]) -> tuple[NDArray, NDArray]:
    if len(parts) == 1:
        return parts[0]
    bits, row_token = zip(*parts, strict=True)
    return np.concatenate(bits), np.concatenate(row_token)
