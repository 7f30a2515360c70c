"""Genealogy: the features of an SAE followed back through earlier versions of it.

Versions are SAEs in an order: what a run kept along the way, ever wider dictionaries, other seeds,
other layers. The last is the one whose features are followed. Each of its features is compared with
all of every version, by decoder directions or by activations on the same positions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saescope.errors import InputError, check_range
from store.matching import (
    MATCHED,
    Block,
    Floats,
    Matching,
    correlation_blocks,
    cosine_blocks,
    match_features,
)

_NULL = 1024
"""random directions, or features on displaced positions, that the others are compared with"""
EVENTS = pa.schema(
    {"kind": pa.string(), "version": pa.int64(), "feature": pa.int64(), "others": pa.string()}
)


@dataclass(frozen=True, kw_only=True)
class Genealogy:
    """What each feature of the last version was in the versions before it."""

    names: tuple[str, ...]
    """of the versions, the last not counted [versions]"""
    similarity: Floats
    """of each feature to the most similar one of each version [versions, features]"""
    nearest: NDArray[np.int64]
    """the number of that feature [versions, features]"""
    partner: NDArray[np.int64] | None
    """its partner in the one-to-one matching with that version, -1 for none that is similar enough
    [versions, features]; None if it was not matched"""
    events: pa.Table | None
    """merges and splits from each version to the next: kind; version, the number of the later one;
    feature, the one that several came from (split) or became (merge); others, their numbers. None
    if versions were not matched"""
    null: Floats
    """largest similarities of what means nothing to the features of each version [versions, n]:
    random directions, as an untrained decoder has, or activations on other positions"""
    threshold: float
    """similarity from which a feature counts as found in a version"""

    @property
    def found(self) -> NDArray[np.bool_]:
        """Whether each feature is in each version, by its most similar one [versions, features]."""
        return self.similarity >= self.threshold

    @property
    def matched(self) -> NDArray[np.bool_]:
        """The same by its one-to-one partner. InputError if versions were not matched."""
        if self.partner is None:
            raise InputError("versions were not matched one to one", where="genealogy.matched")
        return self.partner >= 0

    def emerged(self, *, one_to_one: bool = False) -> NDArray[np.int64]:
        """For each feature the first version that has it, as have all after it [features].

        The number of versions for a feature that only the last has.
        """
        there = self.matched if one_to_one else self.found
        # from the last version back, for as long as it is there
        lasting = np.logical_and.accumulate(there[::-1], axis=0).sum(0)
        return len(self.names) - lasting

    @property
    def share(self) -> Floats:
        """Share of the features found in each version [versions]."""
        return self.found.mean(1)

    @property
    def null_share(self) -> Floats:
        """The same of what means nothing."""
        return (self.null >= self.threshold).mean(1)

    def table(self) -> pa.Table:
        """A row a feature and version: feature, version, name, similarity, nearest, partner (if
        matched) and emerged, the number of the version from which on it is found."""
        versions, features = self.similarity.shape
        columns: dict[str, Any] = {
            "feature": np.tile(np.arange(features), versions),
            "version": np.repeat(np.arange(versions), features),
            "name": np.repeat(np.array(self.names, dtype=object), features),
            "similarity": self.similarity.ravel(),
            "nearest": self.nearest.ravel(),
        }
        if self.partner is not None:
            partner = self.partner.ravel()
            columns["partner"] = pa.array(partner, mask=partner < 0)
        return pa.table({**columns, "emerged": np.tile(self.emerged(), versions)})


def genealogy_of_directions(
    directions: Sequence[NDArray[Any]],
    names: Sequence[str],
    *,
    threshold: float = MATCHED,
    match: bool = True,
    seed: int = 0,
) -> Genealogy:
    """Follow features by the cosines of decoder directions [features, d], one array a version.

    The last array is of the SAE whose features are followed, and has no name. With `match` versions
    are also matched one to one, and merges and splits are found, which takes several times as long.
    seed: of the random directions.

    Raises InputError for fewer than two arrays, another number of names, or other widths.
    """
    _check(directions, names)
    width = directions[-1].shape[1]
    random = np.random.default_rng(seed).standard_normal((min(_NULL, len(directions[-1])), width))

    def null(version: int) -> Iterator[Block]:
        return cosine_blocks(random.astype(np.float32), directions[version])

    def similarity(a: int, b: int) -> Iterator[Block]:
        return cosine_blocks(directions[a], directions[b])

    sizes = [len(each) for each in directions]
    return _genealogy(similarity, null, sizes, names, threshold, match)


def genealogy_of_codes(
    codes: Sequence[Any],
    names: Sequence[str],
    *,
    threshold: float = MATCHED,
    match: bool = True,
) -> Genealogy:
    """The same by Pearson's correlation of activations: sparse arrays [positions, features].

    What means nothing are here the features of the last version on positions displaced by half of
    all. Raises InputError as `genealogy_of_directions` does, or for other numbers of positions.
    """
    _check(codes, names)
    from scipy.sparse import csc_array, vstack

    ready: list[Any] = [csc_array(each, dtype=np.float64) for each in codes]
    half = ready[-1].shape[0] // 2
    some = ready[-1][:, : min(_NULL, ready[-1].shape[1])].tocsr()
    displaced = vstack([some[half:], some[:half]], format="csc")

    def null(version: int) -> Iterator[Block]:
        return correlation_blocks(displaced, ready[version])

    def similarity(a: int, b: int) -> Iterator[Block]:
        return correlation_blocks(ready[a], ready[b])

    sizes = [each.shape[1] for each in ready]
    return _genealogy(similarity, null, sizes, names, threshold, match)


def _check(versions: Sequence[Any], names: Sequence[str]) -> None:
    if len(versions) < 2:
        raise InputError(
            "needs an SAE and one version of it or more", where="genealogy", given=len(versions)
        )
    if len(names) != len(versions) - 1:
        raise InputError(
            "one name a version, the last not counted",
            where="genealogy",
            given=len(names),
            allowed=str(len(versions) - 1),
        )


def _genealogy(
    similarity: Callable[[int, int], Iterable[Block]],
    null: Callable[[int], Iterable[Block]],
    sizes: Sequence[int],
    names: Sequence[str],
    threshold: float,
    match: bool,
) -> Genealogy:
    """Args: similarity gives that of two versions' features by the numbers of the versions."""
    check_range("threshold", threshold, above=0, high=1)
    last = len(sizes) - 1
    nearest, strongest, partners, events = [], [], [], []
    for version in range(last):
        if not match:
            index, value = _nearest(similarity(last, version))
        else:
            found = match_features(
                similarity(last, version), sizes[last], sizes[version], threshold=threshold
            )
            index, value = found.nearest_a, found.similarity_a
            partners.append(_partners(found))
            step = found
            if version + 1 < last:
                step = match_features(
                    similarity(version + 1, version),
                    sizes[version + 1],
                    sizes[version],
                    threshold=threshold,
                )
            events += merges_and_splits(step, version + 1)
        nearest.append(index)
        strongest.append(value)
    return Genealogy(
        names=tuple(names),
        similarity=np.stack(strongest),
        nearest=np.stack(nearest),
        partner=np.stack(partners) if match else None,
        events=pa.Table.from_pylist(events, schema=EVENTS) if match else None,
        null=np.stack([_nearest(null(version))[1] for version in range(last)]),
        threshold=threshold,
    )


def _nearest(blocks: Iterable[Block]) -> tuple[NDArray[np.int64], Floats]:
    """The most similar feature of B for each of A, and its similarity."""
    index, value = [], []
    for _, block in blocks:
        best = block.argmax(1)
        index.append(best.astype(np.int64))
        value.append(block[np.arange(len(block)), best].astype(np.float64))
    return np.concatenate(index), np.concatenate(value)


def _partners(found: Matching) -> NDArray[np.int64]:
    partner = np.full(len(found.nearest_a), -1, np.int64)
    pairs = found.matched
    partner[pairs["feature_a"].to_numpy()] = pairs["feature_b"].to_numpy()
    return partner


def merges_and_splits(step: Matching, version: int = 1) -> list[dict[str, Any]]:
    """Merges and splits on the way to a version (A of the matching) from the one before (B).

    Each as a row of `EVENTS`; a feature counts from the matching's threshold on.
    """
    events = []
    for kind, nearest, value in (
        ("split", step.nearest_a, step.similarity_a),
        ("merge", step.nearest_b, step.similarity_b),
    ):
        number = np.flatnonzero(value >= step.threshold)
        target = nearest[number]
        for feature in np.flatnonzero(np.bincount(target, minlength=1) > 1):
            others = " ".join(map(str, number[target == feature]))
            events.append(
                {"kind": kind, "version": version, "feature": int(feature), "others": others}
            )
    return events
