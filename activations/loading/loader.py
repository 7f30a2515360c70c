"""Batches for training: rows shuffled in groups from all over a harvest, exactly resumable."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import (
    Any,
    Generic,
    Literal,
    Required,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    get_args,
    overload,
)

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from activations.loading.epoch_order import Order, ReadingOrder, SliceReader
from activations.loading.gather import Gatherer
from activations.loading.neighbours import check_has_neighbours, paired_order
from activations.loading.unshuffled import checked_sites
from activations.storage.layout import ROW_TOKEN
from activations.storage.reader import ActivationStore
from activations.storage.row_formats import RowArray, rows_in
from saescope.errors import InputError, check_choice
from saescope.integers import as_index

BatchT = TypeVar("BatchT", covariant=True)
"""A tensor [batch, d_in] for one site by its name, a tuple of them for several."""
ItemT = TypeVar("ItemT")
BatchDtype = Literal["float32", "bfloat16"]
Space = dict[str, NDArray[Any]]
"""Room for a group's rows, by array."""
_Batch = tuple[dict[str, Tensor], list[Future[None]]]
"""By name (see `_sources`), and what is to be waited for until it is filled."""
_GATHERERS = 2
"""Threads: one alone does not fill the memory's bus."""
_Sources = tuple[tuple[str, ...], tuple[int, ...], torch.dtype]
"""Of a batch: the arrays it is made from, shape of an entry, and dtype."""


class LoaderOptions(TypedDict, total=False):
    """Types of what an ActivationLoader takes by name; it says what each is."""

    batch_size: Required[int]
    split: str
    seed: int
    epochs: int | None
    drop_last: bool
    mix_chunks: int
    order: Order | None
    device: torch.device | str
    dtype: BatchDtype
    prefetch: int
    neighbours: bool


class ActivationLoader(Generic[BatchT]):
    """Iterate over shuffled batches [batch, d_in] in float32 of one site of a store, or of several.

    The split is read in a random order, different in each epoch, and as many rows as `mix_chunks`
    chunks have are shuffled together; batches run across the borders of these groups. While one
    group is given out the next is read, so two are in memory. `epochs` None goes on for ever. After
    the last batch the loader stands at the beginning again. `with_rows` also tells where each row
    comes from.

    Args:
        order: spread (nearest to independent draws), chunks or windows; see epoch_order. Where
            activations are computed there is windows alone, else spread if it is not given.
        device: where batches are put; on CUDA through pinned memory, turned to float32 there.
        dtype: of batches: float32, or bfloat16, which is what most stores have and takes half the
            memory (rows stored as int8 are rounded to it).
        prefetch: batches that a thread has ready before they are asked for, while another reads
            the next group; with 0 there is neither, and one group in memory. Where activations are
            computed it is 0. What was not handed out yet does not count in the state.
        neighbours: neighbouring tokens of a sequence follow each other, two by two, where both are
            rows; only in the order "windows", of windows with no more than mix_chunks chunks.

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
        **options: Unpack[LoaderOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: "ActivationLoader[tuple[Tensor, ...]]",
        store: ActivationStore,
        sites: Sequence[str],
        **options: Unpack[LoaderOptions],
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
        order: Order | None = None,
        device: torch.device | str = "cpu",
        dtype: BatchDtype = "float32",
        prefetch: int = 4,
        neighbours: bool = False,
    ) -> None:
        batch_size = as_index(batch_size, where="batch_size", low=1)
        mix_chunks = as_index(mix_chunks, where="mix_chunks", low=1)
        seed = as_index(seed, where="seed", low=0)
        prefetch = as_index(prefetch, where="prefetch", low=0)
        check_choice("no dtype of batches", "dtype", dtype, get_args(BatchDtype))
        if epochs is not None:
            epochs = as_index(epochs, where="epochs", low=1)
        self.sites = checked_sites(store, sites)
        self.widths = tuple(store.d_in(site) for site in self.sites)
        self._alone = isinstance(sites, str)
        self._rows = store.n_rows(split)
        self._check_rows(split, batch_size if drop_last else 1)
        self.batch_size = batch_size
        self.epochs = epochs
        self._reading = ReadingOrder(store, split, order, mix_chunks=mix_chunks, seed=seed)
        if neighbours:
            check_has_neighbours(self._reading, mix_chunks)
        self._whole = self._reading.order != "spread"
        self._reader = SliceReader(store, self._reading.slice_rows)
        self.device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        # elsewhere rows go as they are stored, which is less to move, and are turned there
        self._finished = self.device.type == "cpu"
        self._prefetch = 0 if store.storage == "none" else prefetch
        self._store = store
        self._drop_last = drop_last
        self._identity = {
            "harvest": store.hash,
            "site": sites if isinstance(sites, str) else list(sites),
            "split": split,
            "seed": seed,
            "batch_size": batch_size,
            "mix_chunks": mix_chunks,
            "drop_last": drop_last,
            "order": self._reading.order,
            "neighbours": neighbours,
        }
        self._seed = seed
        self._epoch = self._batch = 0
        self._buffers: list[Space] = []

    def _check_rows(self, split: str, needed: int) -> None:
        if self._rows < needed:
            raise InputError(
                f"the {split} split of {self.sites[0]} has only {self._rows} rows",
                where="batch_size",
                given=needed,
                allowed=f"1 to {self._rows}",
            )

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
        state = {"order": "chunks", "neighbours": False, **state}  # older states do not say
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise InputError(
                    f"the state of another loader: {name} differs",
                    where="load_state_dict",
                    given=state.get(name),
                    allowed=str(value),
                )
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def __iter__(self) -> Iterator[BatchT]:
        return (x for x, _ in self.with_rows())

    def with_rows(self) -> Iterator[tuple[BatchT, Int64[Tensor, " batch"]]]:
        """The same batches, each with the flat token index (row_token) of its rows."""
        made = self._made(self._epoch, self._batch)
        for batch, pending in _made_ahead(made, self._prefetch):
            for each in pending:
                each.result()
            # moved before the batch is handed out: a state taken now goes on after it
            self._batch += 1
            if self._batch == self.batches_per_epoch:
                self._epoch, self._batch = self._epoch + 1, 0
            x = tuple(self._delivered(site, batch) for site in self.sites)
            yield cast(BatchT, x[0] if self._alone else x), batch[ROW_TOKEN]
        self._epoch = self._batch = 0

    def _delivered(self, site: str, batch: Mapping[str, Tensor]) -> Tensor:
        if self._finished:
            return batch[site]
        arrays = [batch[name] for name in self._store.arrays_of(site)]
        return rows_in([a.to(self.device, non_blocking=True) for a in arrays], self._dtype)

    def _made(self, epoch: int, first: int) -> Iterator[_Batch]:
        """Batches from number `first` of an epoch on."""
        arrays = {ROW_TOKEN: RowArray("int64", ())}
        for site in self.sites:
            arrays |= self._store.arrays_of(site)
        spaces = [self._space(arrays) for _ in range(2 if self._prefetch else 1)]
        with Gatherer(_GATHERERS if self._prefetch else 0) as gatherer:
            while self.epochs is None or epoch < self.epochs:
                groups = self._groups(epoch, first * self.batch_size, spaces)
                groups = _made_ahead(groups, len(spaces) - 1)
                yield from self._filled(groups, first, self._sources(arrays), gatherer)
                epoch, first = epoch + 1, 0
        self._buffers = spaces

    def _filled(
        self,
        groups: Iterator[tuple[Space, NDArray[np.int64]]],
        first: int,
        sources: Mapping[str, _Sources],
        gatherer: Gatherer,
    ) -> Iterator[_Batch]:
        """The batches of an epoch from number `first` on, out of its groups."""
        space, order = Space(), np.empty(0, np.int64)
        for number in range(first, self.batches_per_epoch):
            size = min(self.batch_size, self._rows - number * self.batch_size)
            batch = {
                name: self._empty(size, tail, kind) for name, (_, tail, kind) in sources.items()
            }
            pending: list[Future[None]] = []
            filled = 0
            while filled < size:
                if not len(order):
                    gatherer.wait()  # from here on the group before is overwritten
                    space, order = next(groups)
                index, order = np.split(order, [size - filled])
                now = slice(filled, filled + len(index))
                pieces = [
                    ([space[a] for a in sources[name][0]], batch[name][now]) for name in sources
                ]
                pending += gatherer.start(pieces, index)
                filled += len(index)
            yield batch, pending

    def _sources(self, arrays: Mapping[str, RowArray]) -> dict[str, _Sources]:
        """What a batch is made of: each array that is read, or where it stays here, each site."""
        sources: dict[str, _Sources] = {
            name: ((name,), each.tail, getattr(torch, each.dtype))
            for name, each in arrays.items()
            if each.site is None or not self._finished
        }
        if self._finished:
            for site, width in zip(self.sites, self.widths, strict=True):
                sources[site] = (tuple(self._store.arrays_of(site)), (width,), self._dtype)
        return sources

    def _space(self, arrays: Mapping[str, RowArray]) -> Space:
        # used again and again: fresh memory costs as much as what is done with it
        if self._buffers:
            return self._buffers.pop()
        return self._reader.room(arrays, self._reading.longest, self._whole)

    def _empty(self, rows: int, tail: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Space for rows; in memory that a CUDA device copies from by itself, if they go to one."""
        return torch.empty((rows, *tail), dtype=dtype, pin_memory=self.device.type == "cuda")

    def _groups(
        self, epoch: int, skip: int, spaces: Sequence[Space]
    ) -> Iterator[tuple[Space, NDArray[np.int64]]]:
        """Put a group's rows at a time into one space after another; the order to take them in.

        The first `skip` rows are left out; groups that are skipped whole are not read.
        """
        for number, group in enumerate(self._reading.groups(epoch)):
            rows = sum(part.rows for part in group)
            if skip >= rows:
                skip -= rows
                continue
            space = spaces[number % len(spaces)]
            index = self._reader.read(group, self._whole, space)
            random = np.random.default_rng((self._seed, epoch, number))
            if self._identity["neighbours"]:
                order = paired_order(space[ROW_TOKEN][index], self._store.context, random)
            else:
                order = random.permutation(rows)
            yield space, index[order[skip:]]
            skip = 0


def _made_ahead(source: Iterator[ItemT], count: int) -> Iterator[ItemT]:
    """The items of an iterator, up to `count` of them made in a thread before they are asked for.

    An error comes out where its item would have. The thread ends with the iterator, also when that
    is closed or let go of.
    """
    if count == 0:
        yield from source
        return
    end: Any = object()
    with ThreadPoolExecutor(1, "activation-loader") as pool:
        waiting = deque(pool.submit(next, source, end) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, source, end))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)
