"""What a store writer takes besides activations: groups of documents, and what weights say."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from saescope.errors import InputError
from store.columns import column, same_length, within

GROUP_KINDS = ("topic", "source")
MOST_GROUPS = 100
"""groups of documents of one kind"""
LOGIT_BINS = 40


class FactWriter:
    """The part of a store writer for facts of schema 4; any of them may be left out."""

    d_sae: int

    if TYPE_CHECKING:

        def _insert(self, table: str, rows: pa.Table) -> None: ...

    def add_document_groups(self, kind: str, document: ArrayLike, names: Sequence[str]) -> None:
        """The group of a kind ("topic" or "source") that documents are in, each in one; call once
        a kind. Documents that are not given are in none.

        Raises InputError for another kind, a document given twice, or more than 100 groups.
        """
        if kind not in GROUP_KINDS:
            raise InputError("no such kind", where="kind", given=kind, allowed=GROUP_KINDS)
        numbers = column("document", document, np.int32)
        same_length(document=numbers, name=np.empty(len(names)))
        if len(np.unique(numbers)) < len(numbers):
            raise InputError("a document was given twice", where=f"groups of kind {kind}")
        count = len(set(names))
        if count > MOST_GROUPS:
            raise InputError(
                "too many groups", where=kind, given=count, allowed=f"at most {MOST_GROUPS}"
            )
        kinds = [kind] * len(names)
        if count > 1:  # one group of all is none
            rows = {"document": numbers, "kind": kinds, "name": list(names)}
            self._insert("document_group", pa.table(rows))

    def add_logit_histograms(
        self, feature: ArrayLike, low: ArrayLike, high: ArrayLike, counts: ArrayLike
    ) -> None:
        """The effects of features [n] on all logits: lowest, highest, and counts [n, 40] in equal
        bins from one to the other."""
        columns = {
            "feature": column("feature", feature, np.int32),
            "low": column("low", low, np.float32),
            "high": column("high", high, np.float32),
        }
        bins = np.ascontiguousarray(counts, dtype=np.int32)
        same_length(**columns, counts=bins)
        within("feature", columns["feature"], self.d_sae)
        if bins.ndim != 2 or bins.shape[1] != LOGIT_BINS:
            allowed = f"[features, {LOGIT_BINS}]"
            raise InputError("has a wrong shape", where="counts", given=bins.shape, allowed=allowed)
        offsets = np.arange(len(bins) + 1, dtype=np.int32) * LOGIT_BINS
        lists = pa.ListArray.from_arrays(offsets, pa.array(bins.ravel()))
        self._insert("logit_histogram", pa.table({**columns, "counts": lists}))

    def add_layers(
        self, sites: Sequence[str], tokens: int, cosine_next: Sequence[float | None]
    ) -> None:
        """The layers of an SAE of several, in order; see the table `layer`; call once."""
        numbers = np.arange(len(sites), dtype=np.int16)
        same_length(site=numbers, cosine_next=np.empty(len(cosine_next)))
        rows = {
            "layer": numbers,
            "site": list(sites),
            "tokens": np.full(len(sites), tokens, dtype=np.int64),
            "cosine_next": pa.array(list(cosine_next), pa.float64()),
        }
        self._insert("layer", pa.table(rows))

    def add_layer_profiles(self, amount: ArrayLike, count: ArrayLike | None) -> None:
        """What each feature does at each layer: amount, count [layers, d_sae]; call once.

        Features that do nothing anywhere get no rows.
        """
        amounts = np.ascontiguousarray(amount, dtype=np.float64)
        if amounts.ndim != 2 or amounts.shape[1] != self.d_sae or not (amounts >= 0).all():
            allowed = f"[layers, {self.d_sae}], none below 0"
            raise InputError(
                "is no table of layers", where="amount", given=amounts.shape, allowed=allowed
            )
        total = amounts.sum(0)
        feature = np.repeat(np.flatnonzero(total > 0), len(amounts))
        layer = np.tile(np.arange(len(amounts)), int((total > 0).sum()))
        chosen = amounts[layer, feature]
        counts = None if count is None else np.asarray(count)[layer, feature]
        rows = {
            "feature": feature.astype(np.int32),
            "layer": layer.astype(np.int16),
            "count": pa.nulls(len(layer), pa.int64()) if counts is None else counts,
            "amount": chosen,
            "share": chosen / total[feature],
        }
        self._insert("layer_profile", pa.table(rows))

    def add_head_norms(self, norms: ArrayLike) -> None:
        """Norms [d_sae, heads] of what each feature writes to each head; call once."""
        values = np.ascontiguousarray(norms, dtype=np.float64)
        if values.ndim != 2 or len(values) != self.d_sae:
            allowed = f"[{self.d_sae}, heads]"
            raise InputError(
                "has a wrong shape", where="norms", given=values.shape, allowed=allowed
            )
        n_features, heads = values.shape
        total = values.sum(1, keepdims=True)
        share = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
        rows = {
            "feature": np.repeat(np.arange(n_features, dtype=np.int32), heads),
            "head": np.tile(np.arange(heads, dtype=np.int16), n_features),
            "norm": values.ravel().astype(np.float32),
            "share": share.ravel().astype(np.float32),
        }
        self._insert("head_norm", pa.table(rows))
