"""Cached computations of the pages that compare: two groups of documents, two SAEs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import streamlit as st

from dashboards.queries import Version, open_store, version_of
from dashboards.tokens import plain_visible
from store import Annotations, FeatureStore
from store.diff import DatasetDiff, diff, documents_of_feature

_DAY = 86_400
_KINDS = ("title", "key")
_WILD = frozenset("*?[")


def written_group(kind: str, words: str) -> str:
    """A group of documents as `store.document_groups` reads it, from what a reader chose and typed.

    A word without a wildcard is looked for anywhere in the title or key.

    >>> written_group("title", "music | *song"), written_group("held_out", "")
    ('title:*music*|*song', 'split:held_out')
    """
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
    return kind, "|".join(_unwrapped(part) for part in rest.split("|"))


def _unwrapped(part: str) -> str:
    inner = part[1:-1]
    around = len(part) > 2 and part[0] == part[-1] == "*"
    return inner if around and not _WILD & set(inner) else part


def stores_of_same_sae(stores: Mapping[str, Path], name: str) -> list[str]:
    """Names of the other stores that are of the same SAE as this one."""
    mine = open_store(stores[name]).meta.get("sae_hash")
    others = [other for other in stores if other != name]
    return [o for o in others if mine and open_store(stores[o]).meta.get("sae_hash") == mine]


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
