"""What end-to-end training reads: whole training sequences of a harvest, in a random order."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from activations import ActivationStore
from activations.loading.outliers import OutlierFilter
from sae.core.batch import RawBatch
from sae.data.streams import OneSite
from sae.training.end_to_end import EndToEnd, SequenceRows
from saescope.errors import InputError


class EndToEndStream(OneSite):
    """Batches of whole training sequences of a harvest, their rows computed anew by the model.

    Sequences come in a random order, another each epoch; a batch has as many as give about
    batch_size rows. Held-out rows and statistics are the harvest's. Outliers are left out and their
    positions stay as they are in the model.

    Raises InputError as OneSite does, or if there are fewer sequences than a batch.
    """

    KIND = "end_to_end"

    def __init__(
        self,
        store: ActivationStore,
        end_to_end: EndToEnd,
        *,
        batch_size: int,
        seed: int = 0,
        outliers: OutlierFilter | None = None,
    ) -> None:
        site = end_to_end.site
        super().__init__(store, [site], batch_size=batch_size, seed=seed, outliers=outliers)
        self.end_to_end = end_to_end
        self._train = np.flatnonzero(store.split == 0)
        self.sequences_per_batch = max(
            1, round(batch_size * len(self._train) / store.n_rows("train"))
        )
        if self.sequences_per_batch > len(self._train):
            raise InputError(
                "fewer training sequences than one batch",
                where="batch_size",
                given=batch_size,
                allowed=f"up to {store.n_rows('train')}",
            )
        self._epoch = self._batch = 0

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one pass over the training sequences."""
        return len(self._train) // self.sequences_per_batch

    def __iter__(self) -> Iterator[RawBatch]:
        while True:
            chosen = self._chosen()
            self._batch += 1
            if self._batch == self.batches_per_epoch:
                self._epoch, self._batch = self._epoch + 1, 0
            batch, removed = self._sequence_rows(chosen)
            self.removed += removed
            if len(batch):
                yield batch

    def _chosen(self) -> Sequence[int]:
        """The sequences of the next batch, in the store's order, in which they are read faster."""
        order = np.random.default_rng((self._seed, self._epoch)).permutation(self._train)
        start = self._batch * self.sequences_per_batch
        return np.sort(order[start : start + self.sequences_per_batch]).tolist()

    def _sequence_rows(self, chosen: Sequence[int]) -> tuple[SequenceRows, int]:
        tokens = torch.from_numpy(self.store.tokens[chosen]).long()
        keep = torch.from_numpy(self.store.keep[chosen])
        x, sequences = self.end_to_end.capture(tokens, keep)
        removed = 0
        if self.outliers is not None:
            whole = self.outliers.keep(self.end_to_end.site, x)
            removed = int((~whole).sum())
            keep = keep.clone()
            keep[keep.clone()] = whole.cpu()
            later = {site: rows[whole] for site, rows in sequences.later.items()}
            x, sequences = x[whole], replace(sequences, keep=keep, later=later)
        first = torch.tensor(chosen)[:, None] * self.store.context
        row_token = (first + torch.arange(keep.shape[1]))[keep]
        return SequenceRows(x, row_token=row_token, sequences=sequences), removed

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; JSON-able."""
        return {
            **self._identity(),
            "epoch": self._epoch,
            "batch": self._batch,
            "removed": self.removed,
            "outliers": self.outliers.to_dict() if self.outliers else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch at which `state_dict` was taken.

        Raises InputError if the state is of another stream.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise InputError(
                    f"the state of another stream: {name} differs",
                    where="load_state_dict",
                    given=state.get(name),
                    allowed=str(value),
                )
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])
        self.removed = int(state["removed"])
        if state["outliers"]:
            self.outliers = OutlierFilter(**state["outliers"])

    def _identity(self) -> dict[str, Any]:
        return {
            **super()._identity(),
            "harvest": self.store.hash,
            "weights": self.end_to_end.model.weights_hash,
            "site": self.end_to_end.site,
            "seed": self._seed,
            "sequences_per_batch": self.sequences_per_batch,
        }
