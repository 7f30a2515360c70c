"""Cached computations of the pages that compare: two groups of documents, two SAEs."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from dashboards import find_stores
from dashboards.queries import Version, document_groups, open_store, summary, version_of
from dashboards.tokens import plain_visible
from saescope.errors import ArtefactError, SaescopeError
from saescope.paths import AnyPath
from store import Annotations, FeatureStore
from store.compare import compare_stores, same_harvest
from store.diff import DatasetDiff, diff, documents_of_feature
from store.fact_writer import GROUP_KINDS
from store.matching import Matching, cosine_blocks, expected_max_cosine, match_features

_DAY = 86_400
_KINDS = ("title", "key")
_WILD = frozenset("*?[")


def written_group(kind: str, words: str) -> str:
    """A group of documents as `store.document_groups` reads it, from what a reader chose and typed.

    A word without a wildcard is looked for anywhere in the title or key.

    >>> written_group("title", "music | *song"), written_group("held_out", "")
    ('title:*music*|*song', 'split:held_out')
    """
    if kind in GROUP_KINDS:
        return f"{kind}:{words}"
    if kind not in _KINDS:
        return f"split:{kind}" if kind in ("train", "held_out") else kind
    parts = [part.strip() for part in words.split("|") if part.strip()]
    return f"{kind}:" + "|".join(p if _WILD & set(p) else f"*{p}*" for p in parts)


def read_group(group: str) -> tuple[str, str]:
    """What `written_group` was given, or would give the same for.

    >>> read_group("title:*music*|*song"), read_group("split:train"), read_group("rest")
    (('title', 'music|*song'), ('train', ''), ('rest', ''))
    """
    kind, _, rest = group.partition(":")
    if kind == "split":
        return rest, ""
    if kind in GROUP_KINDS:
        return kind, rest
    return kind, "|".join(_unwrapped(part) for part in rest.split("|"))


def names_of_groups(store: FeatureStore) -> dict[str, list[str]]:
    """The topics and the sources of a store's documents, by kind."""
    found: dict[str, list[str]] = {kind: [] for kind in GROUP_KINDS}
    for group in document_groups(store, version_of(store.path)):
        found[group.kind].append(group.name)
    return found


def written_names(names: Sequence[str]) -> str:
    """Names of topics or sources as one pattern; a | in a name is any character there.

    >>> written_names(["Arts", "this|that"])
    'Arts|this?that'
    """
    return "|".join(name.replace("|", "?") for name in names)


def _unwrapped(part: str) -> str:
    inner = part[1:-1]
    around = len(part) > 2 and part[0] == part[-1] == "*"
    return inner if around and not _WILD & set(inner) else part


def stores_of_same_sae(stores: Mapping[str, AnyPath], name: str) -> list[str]:
    """Names of the other stores that are of the same SAE as this one."""
    mine = summary(version_of(stores[name]))[0].get("sae_hash")
    others = _facts({other: path for other, path in stores.items() if other != name})
    return [other for other, meta in others.items() if mine and meta.get("sae_hash") == mine]


def _facts(stores: Mapping[str, AnyPath]) -> dict[str, Mapping[str, Any]]:
    """What the stores say of themselves; those that cannot be read are left out."""
    found = {}
    for name, path in stores.items():
        with suppress(SaescopeError, OSError):
            found[name], _ = summary(version_of(path))
    return found


@st.cache_data(max_entries=32, ttl=_DAY, show_spinner="Comparing the documents (some seconds) …")
def dataset_diff(
    version: Version, other: Version | None, a: str, b: str, permutations: int, fdr: float
) -> DatasetDiff:
    """The features that differ between two groups of documents; InputError for wrong groups."""
    store = open_store(Path(version[0]))
    second = None if other is None else open_store(Path(other[0]))
    return diff(store, a, b, other=second, permutations=permutations, fdr=fdr)


@st.cache_data(max_entries=256, ttl=_DAY, show_spinner=False)
def documents(version: Version, feature: int, group: str, outside: str | None) -> pd.DataFrame:
    """The documents of a group in which a feature fires most."""
    store = open_store(Path(version[0]))
    found = documents_of_feature(store, feature, group, outside=outside).to_pandas()
    return found.assign(title=[plain_visible(title) for title in found["title"]])


def with_names(frame: pd.DataFrame, store: FeatureStore, notes: Annotations) -> pd.DataFrame:
    """A table of features with their labels and commonest top tokens after its first column."""
    numbers = [int(number) for number in frame["feature"]]
    labels, tokens = notes.labels(numbers), top_tokens(store, numbers)
    frame = frame.copy()
    frame.insert(1, "label", [labels.get(number, "") for number in numbers])
    frame.insert(2, "tokens", [tokens[number] for number in numbers])
    return frame


def top_tokens(store: FeatureStore, features: Sequence[int]) -> dict[int, str]:
    """The features' commonest top tokens as one readable text each."""
    return _top_tokens(version_of(store.path), tuple(features))


@st.cache_data(max_entries=64, ttl=_DAY, show_spinner=False)
def _top_tokens(version: Version, features: tuple[int, ...]) -> dict[int, str]:
    found = open_store(Path(version[0])).top_tokens(features, 5)
    return {f: "  ".join(plain_visible(token) for token in found[f]) for f in features}


@dataclass(frozen=True)
class SAEComparison:
    """Which features of two SAEs match, and what that is to be compared with."""

    matching: Matching
    chance: float | None
    """mean max similarity of random directions; None where it is not known"""
    over: str
    """what the similarity was computed from"""


def ways(a: FeatureStore, b: FeatureStore) -> dict[str, str]:
    """How two stores' SAEs can be compared: "activations" where they are of one harvest."""
    if same_harvest(a, b):
        return {"activations": "What they fire on", "decoder": "What they write"}
    return {"decoder": "What they write"}


@st.cache_data(max_entries=16, ttl=_DAY, show_spinner="Matching the features (some seconds) …")
def compare(a: Version, b: Version, by: str, threshold: float) -> SAEComparison:
    """Match the features of two stores' SAEs.

    Raises ArtefactError if an SAE may not be loaded or is not the store's; InputError if they
    cannot be compared.
    """
    stores = open_store(Path(a[0])), open_store(Path(b[0]))
    if by == "activations":
        found = compare_stores(*stores, threshold=threshold)
        part = "" if found.positions == found.all_positions else f" of {found.all_positions:,}"
        over = f"correlation of activations over {found.positions:,}{part} positions"
        return SAEComparison(found.matching, None, over)
    one, two = (_directions(store) for store in stores)
    matching = match_features(cosine_blocks(one, two), len(one), len(two), threshold=threshold)
    chance = expected_max_cosine(one.shape[1], len(two))
    return SAEComparison(matching, chance, "cosine of decoder directions")


def _directions(store: FeatureStore) -> Any:
    """The decoder directions [d_sae, d_out] of the very SAE that a store is of."""
    import sae
    from sae.analysis.dictionary_matching import decoder_directions
    from sae.data.provenance import check_indexed

    meta, where = store.meta, str(store.path)
    if not meta.get("sae_path"):
        raise ArtefactError("does not say where its SAE is", where=where)
    path = find_stores.source_to_load("sae", str(meta["sae_path"]), where)
    loaded = sae.load(path, target_site=meta.get("target_site"))
    check_indexed(loaded, meta, where=where)
    return decoder_directions(loaded)


def quality(stores: Mapping[str, AnyPath], name: str) -> pd.DataFrame:
    """L0 and another metric of the SAEs that were measured, for `figures.pareto`."""
    rows = []
    for store, meta in _facts(stores).items():
        metrics = meta.get("metrics") or {}
        values = [metrics.get("l0"), metrics.get(name)]
        if all(isinstance(value, int | float) for value in values):
            half = metrics.get(f"{name}_interval")
            rows.append((store, str(meta.get("protocol") or ""), *values, half))
    frame = pd.DataFrame(rows, columns=["name", "protocol", "l0", name, "half"])
    return frame.astype({"half": float})
