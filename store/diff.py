"""Dataset diff: the features that fire more in one group of documents than in another.

Groups are documents of one store, or of two stores of one SAE. A feature's density in a group is
the share of the group's kept positions at which it fires. Features are computed a block at a time,
so that memory depends on the number of documents and not on that of activations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saescope.errors import InputError, check_range
from saescope.integers import as_index
from saescope.progress import Progress
from store.document_groups import ALL, REST, Documents, read_documents, select_documents
from store.feature_store import FeatureStore
from store.permutation import Relabellings, benjamini_hochberg, density_p_values

_ROWS = 1 << 21
"""activations of a block of features"""
_CELLS = 1 << 24
"""features times documents of a block"""
FEWEST = 2
"""documents that a group must have"""


@dataclass(frozen=True)
class Group:
    """One of the two groups that are compared."""

    name: str
    """as it was asked for"""
    documents: int
    positions: int
    """kept ones"""


@dataclass(frozen=True, kw_only=True)
class DatasetDiff:
    """Which features differ between two groups of documents, and how sure that is."""

    rows: pa.Table
    """One row a feature that fires in either group, surest first, then by size of log2_ratio.

    feature; positions_a, positions_b (at which it fires), documents_a, documents_b (in which);
    density_a, density_b (share of the group's kept positions); difference = density_a - density_b;
    log2_ratio = log2 of (positions_a + 1/2) / (kept_a + 1) over the same of b; p; q (p adjusted
    for all tested features). p and q are null where a feature fires in too few documents.
    """
    a: Group
    b: Group
    tested: int
    """features that fire in enough documents"""
    min_documents: int
    permutations: int
    fdr: float
    seed: int

    @property
    def undecided(self) -> int:
        """Features that no permutation reaches, and that are not found: too few permutations."""
        p, q = self.rows["p"].to_numpy(), self.rows["q"].to_numpy()
        return int(((p <= 1 / (self.permutations + 1)) & (q > self.fdr)).sum())

    @property
    def differing(self) -> pa.Table:
        """The rows of features that differ at the false-discovery rate: q at most `fdr`."""
        q = self.rows["q"].to_numpy()
        return self.rows.filter(pa.array(q <= self.fdr))


@dataclass(frozen=True)
class _Side:
    """Documents chosen in one store, numbered from `first` on in the whole comparison."""

    store: FeatureStore
    documents: Documents
    chosen: NDArray[np.int64]
    first: int
    rows: NDArray[np.int64]
    """first row of each feature in the table of activations, and the end [d_sae + 1]"""

    def counts(self, features: slice, out: NDArray[np.float32]) -> None:
        """Add how often each feature of a block fires in each chosen document to `out`."""
        begin, end = int(self.rows[features.start]), int(self.rows[features.stop])
        found = self.store.database.activations_of(
            "position", (features.start, features.stop), (begin, end)
        )
        position = found["position"]
        self.store.database.check_fits(len(position) == end - begin, "activation_by_feature")
        column_of = np.full(len(self.documents.number) + 1, -1, dtype=np.int64)
        column_of[self.chosen] = self.first + np.arange(len(self.chosen))
        column = column_of[self.documents.at(position)]
        row = np.repeat(np.arange(len(out)), np.diff(self.rows[features.start : features.stop + 1]))
        cell = (row * out.shape[1] + column)[column >= 0]
        out += np.bincount(cell, minlength=out.size).reshape(out.shape)


def diff(
    store: FeatureStore,
    a: str,
    b: str = REST,
    *,
    other: FeatureStore | None = None,
    permutations: int = 10_000,
    fdr: float = 0.05,
    min_documents: int = 5,
    seed: int = 0,
) -> DatasetDiff:
    """Compare how often features fire in two groups of documents.

    Args:
        store: where the documents of group a are, and of b unless `other` is given.
        a: a group, e.g. "title:*river*|*lake*", "topic:Arts", "split:held_out" or "all".
        b: a group, or "rest": all other documents (of `other`: all of them).
        other: another store of the same SAE, for group b.
        permutations: random divisions of the documents that the observed one is compared with.
            With m tested features the least p, 1 / (permutations + 1), must be at most fdr * n / m
            for n features to be found: with few permutations, few features are never found.
        fdr: rate of false discoveries among the features that `differing` gives.
        min_documents: a feature that fires in fewer documents of the two groups together is not
            tested. The bound does not see the groups, so it changes no p (Bourgon et al. 2010).
        seed: of the divisions; the same seed gives the same numbers.

    See `store.permutation` for the test. Cost: one reading of the table of activations, and
    matrix products of [features, documents] with [documents, permutations].

    Raises InputError if a group is written wrongly, has less than two documents, shares a document
    with the other, or the stores are not of one SAE.
    """
    permutations = as_index(permutations, where="permutations", low=1, high=10**7)
    min_documents = as_index(min_documents, where="min_documents", low=1)
    check_range("fdr", fdr, above=0, below=1)
    sides = _sides(store, a, b, other)
    n_a, n_b = (len(side.chosen) for side in sides)
    kept = np.concatenate([side.documents.kept[side.chosen] for side in sides])
    in_a = np.arange(n_a + n_b) < n_a
    relabellings = Relabellings(n_a + n_b, n_a, permutations, as_index(seed, where="seed", low=0))
    columns = _columns(sides, kept, in_a, relabellings, min_documents)
    groups = [
        Group(name, len(side.chosen), int(side.documents.kept[side.chosen].sum()))
        for name, side in zip((a, b), sides, strict=True)
    ]
    return DatasetDiff(
        rows=_table(columns, groups[0].positions, groups[1].positions),
        a=groups[0],
        b=groups[1],
        tested=int(np.isfinite(columns["p"]).sum()),
        min_documents=min_documents,
        permutations=permutations,
        fdr=fdr,
        seed=seed,
    )


def _columns(
    sides: Sequence[_Side],
    kept: NDArray[np.int64],
    in_a: NDArray[np.bool_],
    relabellings: Relabellings,
    min_documents: int,
) -> dict[str, NDArray]:
    """Counts of every feature in both groups, and its p; NaN where it is not tested."""
    d_sae = len(sides[0].rows) - 1
    found: dict[str, list[NDArray]] = {}
    with Progress("comparing", d_sae, "features") as progress:
        for features in _blocks([side.rows for side in sides], len(kept)):
            counts = np.zeros((features.stop - features.start, len(kept)), dtype=np.float32)
            for side in sides:
                side.counts(features, counts)
            p = np.full(len(counts), np.nan)
            enough = (counts > 0).sum(1) >= min_documents
            p[enough] = density_p_values(counts[enough], kept, in_a, relabellings)
            found.setdefault("p", []).append(p)
            for name, inside in (("a", in_a), ("b", ~in_a)):
                group = counts[:, inside]
                found.setdefault(f"positions_{name}", []).append(group.sum(1, dtype=np.float64))
                found.setdefault(f"documents_{name}", []).append((group > 0).sum(1))
            progress.advance(len(counts))
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def _sides(store: FeatureStore, a: str, b: str, other: FeatureStore | None) -> list[_Side]:
    documents_a = read_documents(store)
    chosen_a = select_documents(documents_a, a, "a")
    if other is None:
        store_b, documents_b = store, documents_a
        chosen_b = select_documents(documents_b, ALL if b == REST else b, "b")
        if b == REST:
            chosen_b &= ~chosen_a
        if both := int((chosen_a & chosen_b).sum()):
            raise InputError(
                "a document can be in one group only; b = rest takes all documents that a has not",
                where="b",
                given=f"{b}: shares {both} with a",
            )
    else:
        _check_one_sae(store, other)
        store_b, documents_b = other, read_documents(other)
        chosen_b = select_documents(documents_b, ALL if b == REST else b, "b")
    sides = []
    for where, at, documents, mask in (
        ("a", store, documents_a, chosen_a),
        ("b", store_b, documents_b, chosen_b),
    ):
        if mask.sum() < FEWEST:
            raise InputError(
                "the documents of a group are what is exchanged: it needs more of them",
                where=where,
                given=int(mask.sum()),
                allowed=f"at least {FEWEST}",
            )
        chosen = np.flatnonzero(mask)
        first = len(sides[0].chosen) if sides else 0
        sides.append(_Side(at, documents, chosen, first, _first_rows(at)))
    return sides


def _check_one_sae(store: FeatureStore, other: FeatureStore) -> None:
    hashes = [str(each.meta.get("sae_hash") or "") for each in (store, other)]
    if hashes[0] != hashes[1] or not hashes[0] or store.d_sae != other.d_sae:
        raise InputError(
            "is the store of another SAE: its features are others",
            where=str(other.path),
            given=hashes[1],
            allowed=hashes[0],
        )


def _first_rows(store: FeatureStore) -> NDArray[np.int64]:
    found = store.database.columns("SELECT first_row, n_active FROM db.feature ORDER BY feature")
    first, count = found["first_row"], found["n_active"]
    rows = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
    fits = len(first) == store.d_sae and bool((first == rows[:-1])[count > 0].all())
    store.database.check_fits(fits and bool((count >= 0).all()), "feature")
    return rows


def _blocks(rows: Sequence[NDArray[np.int64]], documents: int) -> Iterator[slice]:
    """Ranges of features with a bounded number of activations and of cells."""
    ends = np.sum(rows, axis=0)
    begin, d_sae = 0, len(ends) - 1
    while begin < d_sae:
        end = int(np.searchsorted(ends, ends[begin] + _ROWS, side="right")) - 1
        end = min(max(end, begin + 1), begin + max(_CELLS // documents, 1), d_sae)
        yield slice(begin, end)
        begin = end


def _table(columns: dict[str, NDArray], kept_a: int, kept_b: int) -> pa.Table:
    a, b, p = columns["positions_a"], columns["positions_b"], columns["p"]
    ratio = np.log2((a + 0.5) / (kept_a + 1)) - np.log2((b + 0.5) / (kept_b + 1))
    q = np.full(len(p), np.nan)
    tested = np.isfinite(p)
    q[tested] = benjamini_hochberg(p[tested])
    live = np.flatnonzero(a + b > 0)
    # untested ones last: NaN sorts behind all numbers
    order = live[np.lexsort((live, -np.abs(ratio[live]), p[live]))]
    density_a, density_b = a / kept_a, b / kept_b
    return pa.table(
        {
            "feature": order.astype(np.int64),
            **{
                name: columns[name][order].astype(np.int64)
                for name in ("positions_a", "positions_b", "documents_a", "documents_b")
            },
            "density_a": density_a[order],
            "density_b": density_b[order],
            "difference": (density_a - density_b)[order],
            "log2_ratio": ratio[order],
            "p": pa.array(p[order], from_pandas=True),
            "q": pa.array(q[order], from_pandas=True),
        }
    )


def documents_of_feature(
    store: FeatureStore, feature: int, group: str, *, outside: str | None = None, n: int = 20
) -> pa.Table:
    """The documents of a group in which a feature fires at most positions, n of them at most.

    document, key, title, positions (at which it fires), kept (positions), share, strongest (its
    largest activation there), position (where that is). `outside` names the group a where the
    group is "rest": all documents that are not in it.
    """
    documents = read_documents(store)
    chosen = select_documents(documents, ALL if group == REST else group, "group")
    if group == REST and outside is not None:
        chosen &= ~select_documents(documents, outside, "outside")
    position, activation = store.activations(feature)
    at = documents.at(position)
    inside = at >= 0
    inside &= chosen[at]
    at, position, activation = at[inside], position[inside], activation[inside]
    # activations come from strong to weak: the first of a document is its strongest
    found, first, count = np.unique(at, return_index=True, return_counts=True)
    kept = documents.kept[found]
    order = np.lexsort((found, -count / kept, -count))[: as_index(n, where="n", low=0)]
    best = first[order]
    return pa.table(
        {
            "document": documents.number[found[order]],
            "key": pa.array([documents.key[i] for i in found[order]], pa.string()),
            "title": pa.array([documents.title[i] for i in found[order]], pa.string()),
            "positions": count[order],
            "kept": kept[order],
            "share": count[order] / kept[order],
            "strongest": activation[best],
            "position": position[best],
        }
    )
