"""The probing suite: every set, seed, setting, method and k; one row of results each.

What a probe is made of is decided on training texts alone: which features (by SMD), the scale of
its columns, the strength of its penalty and its weights. Test texts are scored once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae.probing.config import ProbingConfig
from sae.probing.divisions import TEST_SHARE, Division, divisions
from sae.probing.kept_rows import kept_rows
from sae.probing.labelled_sets import LabelledSet, SetSource
from sae.probing.logistic import FOLDS, STRENGTHS, Labels, fit
from sae.probing.representations import (
    COMPONENTS,
    METHODS,
    Encode,
    Method,
    activations_of,
    features_of,
    principal_components,
)
from sae.probing.scores import accuracy, auc, majority
from sae.probing.selection import Features, columns, standardised_mean_difference, strongest
from sae.probing.text_rows import RowCache
from saescope.artefact import sha256_json
from saescope.errors import InputError
from saescope.paths import remove
from saescope.progress import Progress, say

VERSION = 1
"""of the definitions of this package; other ones give other figures"""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What is probed: an SAE's encoder beside an untrained one's, on rows of a cache."""

    encode: Encode
    untrained: Encode
    sae: str
    """hash of the SAE's weights"""
    cache: RowCache


def protocol(config: ProbingConfig) -> dict[str, Any]:
    """What decides the results besides the sets, their rows and the SAE."""
    chosen = asdict(config)
    return {
        "version": VERSION,
        **{name: chosen[name] for name in ("ks", "seeds", "texts", "scarce", "imbalance")},
        "test_share": TEST_SHARE,
        "selection": "standardised mean difference on the training texts",
        "probe": "logistic regression, L2, standardised columns",
        "strengths": STRENGTHS,
        "folds": FOLDS,
        "components": COMPONENTS,
    }


def probe_sets(
    sources: Mapping[str, SetSource], probed: Probed, config: ProbingConfig
) -> list[Row]:
    """Rows of results of all sets.

    Results of sets that are done are kept in the cache's folder, so that after a kill the others
    follow; `forget_results` removes them. Raises InputError if no set has texts enough.
    """
    rows: list[Row] = []
    with Progress("probing", len(sources), "sets") as progress:
        for name, source in sources.items():
            found = _kept_rows(source.read(), probed, config)
            if not found:
                say(f"{name}: has too few texts of a label, and is left out")
            rows += found
            progress.advance(note=name)
    if not rows:
        raise InputError("no set has texts enough", where="probing.sets", given=list(sources))
    return rows


def _kept_rows(data: LabelledSet, probed: Probed, config: ProbingConfig) -> list[Row]:
    """The results of a set: those of a run that was killed, or computed now."""
    origins = [asdict(origin) for origin in data.origins]
    key = sha256_json(
        [data.name, origins, probed.sae, protocol(config), probed.cache.of.protocol()]
    )
    return kept_rows(
        _results(probed) / f"{key[:32]}.json", lambda: probe_set(data, probed, config), data.name
    )


def _results(probed: Probed) -> Path:
    return probed.cache.root / f"results-{probed.sae[:16]}"


def forget_results(probed: Probed) -> None:
    """Remove what `probe_sets` kept of an SAE, once its results are written elsewhere."""
    remove(_results(probed))


def probe_set(data: LabelledSet, probed: Probed, config: ProbingConfig) -> Iterator[Row]:
    """The rows of results of one set; none if it has too few texts of a label."""
    texts, y = _drawn(data.texts, data.labels, config.texts)
    rows = probed.cache.rows(data.name, texts)
    known = rows.known(len(texts))
    parts = [(rows, known, y)]
    if data.elsewhere is not None:
        others, labels = _drawn(*data.elsewhere, config.texts)
        further = probed.cache.rows(f"{data.name}-elsewhere", others)
        parts.append((further, further.known(len(others)), labels))

    def columns_of(encode: Encode) -> Features:
        from scipy import sparse

        found = [features_of(encode, rows, len(known))[known] for rows, known, _ in parts]
        return sparse.csr_array(sparse.vstack(found, format="csr"))

    raw = np.concatenate([activations_of(rows, len(known))[known] for rows, known, _ in parts])
    by_method: dict[Method, Features] = {
        "sae": columns_of(probed.encode),
        "untrained": columns_of(probed.untrained),
        "raw": raw,
    }
    labels = np.concatenate([y[known] for _, known, y in parts])
    own = int(known.sum())
    for seed in range(config.seeds):
        for division in divisions(
            labels[:own],
            labels[own:],
            seed=seed,
            scarce=config.scarce,
            imbalance=config.imbalance,
        ):
            for row in probe_division(by_method, labels, division, config.ks, seed):
                yield {"set": data.name, **row}


def _drawn(
    texts: tuple[str, ...], labels: Labels, most: int
) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    """At most so many of the texts, drawn by chance, in their order."""
    if len(texts) <= most:
        return texts, labels
    chosen = np.sort(np.random.default_rng(0).permutation(len(texts))[:most])
    return tuple(texts[index] for index in chosen), labels[chosen]


def probe_division(
    by_method: Mapping[Method, Features],
    y: Labels,
    division: Division,
    ks: Sequence[int],
    seed: int,
) -> Iterator[Row]:
    """Rows of results of one division of a set's texts.

    Args: by_method has the columns [texts, ...] of "sae", "untrained" and "raw"; the other methods
    are made of these. Only training texts are looked at before a test text is scored.
    """
    for method in METHODS:
        for k, x, chosen in _candidates(by_method, y, division.train, method, ks, seed):
            probe = fit(x[division.train], y[division.train], seed=seed)
            for setting, test in division.tests.items():
                scores = probe.score(x[test])
                yield {
                    "setting": setting,
                    "method": method,
                    "k": k,
                    "seed": seed,
                    "auc": auc(scores, y[test]),
                    "accuracy": accuracy(scores, y[test]),
                    "majority": majority(y[test]),
                    "train": len(division.train),
                    "test": len(test),
                    "strength": probe.strength,
                    "features": chosen,
                }


def _candidates(
    by_method: Mapping[Method, Features],
    y: Labels,
    train: NDArray[np.int64],
    method: Method,
    ks: Sequence[int],
    seed: int,
) -> Iterator[tuple[int, NDArray[np.float64], list[int]]]:
    """For each k, the columns [texts, k] that a probe sees, and which features they are."""
    raw = by_method["raw"]
    assert isinstance(raw, np.ndarray)
    if method == "raw":
        yield raw.shape[1], raw, []
        return
    features: Features
    if method == "pca":
        features = principal_components(raw, train)
    elif method == "neurons":
        features = raw
    else:
        features = by_method["untrained" if method == "untrained" else "sae"]
    if method == "random":
        fires = np.flatnonzero(abs(features[train]).sum(0))
        order = np.random.default_rng(seed).permutation(fires)
    else:
        order = strongest(standardised_mean_difference(features[train], y[train]), max(ks))
    dense = columns(features, order[: max(ks)])
    for k in sorted(ks):
        if k <= dense.shape[1]:
            named = method in ("sae", "untrained", "random", "neurons")
            yield k, dense[:, :k], order[:k].tolist() if named else []
