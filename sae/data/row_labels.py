"""Labels of rows: which class, or which document, the token of a row belongs to."""

import hashlib
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from activations import ActivationStore
from saescope.errors import InputError

Labels = (
    Literal["document", "neighbours"] | Int[Tensor, " sequence"] | Int[Tensor, "sequence position"]
)
"""The document of each token; a number of each token, one more than that of the token before it in
its sequence and of no other; or integers given by the user, one a sequence or one a token."""


class RowLabels:
    """Looks up the label of a row by its flat token index (row_token).

    Raises InputError for labels that are no integers or do not fit the harvest.

    >>> labels = RowLabels(store, torch.arange(store.n_sequences))  # doctest: +SKIP
    >>> labels.of(torch.tensor([0, 130])).tolist()  # with a context of 128  # doctest: +SKIP
    [0, 1]
    """

    def __init__(self, store: ActivationStore, labels: Labels) -> None:
        self._context = store.context
        self._table: Tensor | None = None
        if labels == "neighbours":
            self.hash = hashlib.sha256(f"neighbours {store.context}".encode()).hexdigest()
            return
        if isinstance(labels, str):
            if labels != "document":
                raise InputError(
                    "no such labels",
                    where="labels",
                    given=labels,
                    allowed="document, neighbours, or a tensor",
                )
            labels = torch.from_numpy(store.document[:])
        whole, sequences = (store.n_sequences, store.context), (store.n_sequences,)
        if tuple(labels.shape) not in (whole, sequences) or labels.is_floating_point():
            raise InputError(
                "labels must be integers, one a sequence or one a token",
                where="labels",
                given=f"{labels.dtype} {tuple(labels.shape)}",
                allowed=f"{sequences} or {whole}",
            )
        self._tokens_each = 1 if labels.ndim == 2 else store.context
        self._table = labels.flatten()
        wide = self._table.to(torch.int64).numpy()
        shape = np.array(labels.shape, np.int64)
        self.hash = hashlib.sha256(shape.tobytes() + wide.tobytes()).hexdigest()
        """sha256 of the labels."""

    def of(self, row_token: Int64[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
        """Label of each row."""
        if self._table is None:  # a number between each sequence's last and the next one's first
            return row_token + row_token // self._context
        return self._table[row_token // self._tokens_each].to(torch.int64)
