"""The pages' queries of stores: a store is opened once a process, and answers are cached."""

import functools
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import streamlit as st

from dashboards.feature_view import matching
from dashboards.tokens import plain, plain_visible
from saescope.errors import SaescopeError
from saescope.paths import AnyPath, as_path, object_version
from store import Annotations, FeatureFilter, FeatureStore
from store.fact_results import (
    DocumentGroup,
    Enrichment,
    HeadNorm,
    Layer,
    LayerShare,
    MeasuredEffects,
)
from store.pictures import Grid
from store.profiles import has_profiles
from store.results import (
    Coactivation,
    Example,
    Feature,
    Histogram,
    Logits,
    Neighbour,
    Overview,
    PositionProfile,
    TokenShare,
)

if TYPE_CHECKING:
    from upath import UPath

Version = tuple[str, str, int, int]
_LOOK_AGAIN = 5.0
_DAY = 86_400
EXAMPLE_KINDS = {"top": "Strongest", "interval": "By interval"}
"""the kinds of examples that a store has, as readers choose them"""


@dataclass(frozen=True)
class Facts:
    """What stores have of a feature since schema 4."""

    logits: Histogram | None
    """of the effects on the logits of all tokens"""
    has_groups: bool
    """whether the store's documents have topics or sources"""
    groups: list[Enrichment]
    """in which the feature fires more often than by chance"""
    layers: list[Layer]
    """of an SAE of several"""
    layer_shares: list[LayerShare]
    heads: list[HeadNorm]
    """of an SAE at the outputs of attention heads"""


@dataclass(frozen=True)
class FeatureData:
    """All that the feature page shows, except examples; for panels."""

    feature: Feature
    histogram: Histogram
    logits: Logits
    neighbours: list[Neighbour]
    coactivating: list[Coactivation]
    tokens: list[TokenShare] | None
    """None where the store is of a schema that has no profiles"""
    positions: PositionProfile | None
    measured: MeasuredEffects | None
    """None where effects were not measured"""
    facts: Facts | None
    """None where the store is of a schema that has none"""
    grid: Grid | None
    """of a store of pictures: how positions lie on one"""
    previous: int | None
    next: int | None


def version_of(path: AnyPath) -> Version:
    """Identity of a store's file, which changes when the store is built anew.

    An object store is asked every few seconds, not at every look.
    """
    if not isinstance(path, Path):
        return _remote_version(str(path), int(time.monotonic() / _LOOK_AGAIN))
    facts = path.stat()
    return str(path), f"{facts.st_mtime_ns}", facts.st_ino, facts.st_size


@functools.lru_cache(maxsize=64)
def _remote_version(url: str, moment: int) -> Version:
    said, size = object_version(cast("UPath", as_path(url)))
    return url, said, 0, size


# A store that is dropped from the cache is closed once no session uses it any more, which is two
# minutes after its page was left: until then one that is asked for again is not opened twice.
_IN_USE: weakref.WeakValueDictionary[Version, FeatureStore] = weakref.WeakValueDictionary()


@st.cache_resource(max_entries=16, show_spinner=False)
def _open(version: Version) -> FeatureStore:
    store = _IN_USE.get(version)
    if store is None:
        _IN_USE[version] = store = FeatureStore.open(version[0])
    return store


def open_store(path: AnyPath) -> FeatureStore:
    """The open store, shared by all sessions; opened anew when its file has been replaced."""
    return _open(version_of(path))


@st.cache_resource(max_entries=16, show_spinner=False, on_release=lambda notes: notes.close())
def _annotations(path: str, sae_hash: str) -> Annotations:
    return Annotations.open(path, sae_hash=sae_hash)


def annotations(store: FeatureStore) -> Annotations:
    """People's labels and notes about the store's features."""
    return _annotations(str(store.path), str(store.meta.get("sae_hash") or ""))


@st.cache_data(max_entries=64, ttl=_DAY, show_spinner=False)
def overview(_store: FeatureStore, version: Version) -> Overview:
    """The store in numbers."""
    return _store.overview()


@st.cache_data(max_entries=512, ttl=_DAY, show_spinner=False)
def summary(version: Version) -> tuple[Mapping[str, Any], Overview]:
    """A store's facts and numbers, for pages about many stores: known ones are not opened again."""
    store = _open(version)
    return dict(store.meta), store.overview()


@st.cache_data(max_entries=64, ttl=_DAY, show_spinner=False)
def densities(_store: FeatureStore, version: Version) -> np.ndarray:
    """Every feature's density."""
    return _store.densities()


@st.cache_data(max_entries=512, ttl=_DAY, show_spinner=False)
def feature(_store: FeatureStore, version: Version, number: int) -> FeatureData:
    """A feature's page without its examples."""
    profiled = has_profiles(int(_store.meta["schema"]))
    return FeatureData(
        feature=_store.feature(number),
        histogram=_store.histogram(number),
        logits=_store.logits(number),
        neighbours=_store.neighbours(number),
        coactivating=_store.coactivating(number),
        tokens=_store.token_profile(number) if profiled else None,
        positions=_store.position_profile(number) if profiled else None,
        measured=_store.measured_effects(number),
        facts=_facts(_store, version, number) if _store.has_facts else None,
        grid=_store.grid,
        previous=_store.previous_live(number),
        next=_store.next_live(number),
    )


def _facts(store: FeatureStore, version: Version, number: int) -> Facts:
    return Facts(
        logits=store.logit_histogram(number),
        has_groups=bool(document_groups(store, version)),
        groups=store.enrichments(number),
        layers=store.layers(),
        layer_shares=store.layer_profile(number),
        heads=store.head_norms(number),
    )


@st.cache_data(max_entries=64, ttl=_DAY, show_spinner=False)
def document_groups(_store: FeatureStore, version: Version) -> list[DocumentGroup]:
    """The topics and sources of the store's documents; none in a store of an older schema."""
    return _store.document_groups() if _store.has_facts else []


@st.cache_data(max_entries=256, ttl=_DAY, show_spinner=False)
def examples(
    _store: FeatureStore, version: Version, number: int, kind: str, window: int | None
) -> list[Example]:
    """A feature's examples."""
    return _store.examples(number, kind, window)


@st.cache_data(max_entries=256, ttl=_DAY, show_spinner=False)
def _table(
    _store: FeatureStore,
    version: Version,
    filters: FeatureFilter,
    sort: str,
    descending: bool,
    limit: int,
    offset: int,
) -> tuple[pd.DataFrame, int]:
    page = _store.features(filters, sort, descending, limit, offset)
    frame = page.rows.to_pandas()
    numbers = [int(number) for number in frame["feature"]]
    tokens = _store.top_tokens(numbers, 5)
    frame["tokens"] = [
        "  ".join(plain_visible(t).replace(" ", "␣") for t in tokens[n]) for n in numbers
    ]
    return frame, page.total


def table(
    store: FeatureStore,
    notes: Annotations,
    filters: FeatureFilter,
    *,
    sort: str,
    descending: bool,
    limit: int,
    offset: int,
) -> tuple[pd.DataFrame, int]:
    """One page of the feature table with labels and commonest top tokens, and the total."""
    version = version_of(store.path)
    frame, total = _table(store, version, filters, sort, descending, limit, offset)
    labels = notes.labels([int(number) for number in frame["feature"]])
    return frame.assign(label=[labels.get(int(n), "") for n in frame["feature"]]), total


@dataclass(frozen=True)
class Name:
    """What a feature is called for readers."""

    text: str
    """the label, else the commonest top tokens"""
    labelled: bool

    @property
    def markdown(self) -> str:
        """The name, in grey where it is tokens.

        >>> Name("sea", True).markdown, Name("sea · bay", False).markdown
        ('sea', ':gray[sea · bay]')
        """
        return plain(self.text) if self.labelled else f":gray[{plain(self.text)}]"


def named(
    store: FeatureStore, notes: Annotations, features: Sequence[int], tokens: int = 3
) -> dict[int, Name]:
    """What features are called, and whether that is a label."""
    labels = notes.labels(list(features))
    bare = [feature for feature in features if not labels.get(feature)]
    found = store.top_tokens(bare, tokens)
    return {
        f: Name(labels[f], True) if labels.get(f) else Name(called(found[f], tokens), False)
        for f in features
    }


def names(
    store: FeatureStore, notes: Annotations, features: Sequence[int], tokens: int = 3
) -> dict[int, str]:
    """What features are called, where a label and tokens need not be told apart."""
    return {f: name.text for f, name in named(store, notes, features, tokens).items()}


def muted(frame: pd.DataFrame, labelled: Mapping[str, Sequence[bool]]) -> Any:
    """A table for Streamlit whose names are grey where they are tokens.

    labelled: by column of names, whether each row's is a label.
    """
    grey = {
        column: ["" if each else "color: rgb(128, 132, 140)" for each in rows]
        for column, rows in labelled.items()
    }
    return frame.style.apply(lambda column: grey[str(column.name)], subset=list(grey))


@st.cache_data(max_entries=256, ttl=_DAY, show_spinner=False)
def statistics(
    _store: FeatureStore, version: Version, features: tuple[int, ...]
) -> dict[int, tuple[float, float]]:
    """The features' strongest activations in the store, and densities."""
    if not features:
        return {}
    page = _store.features(FeatureFilter(ids=features), limit=len(features)).rows
    columns = (page.column(name).to_pylist() for name in ("feature", "max", "density"))
    return {feature: (top, density) for feature, top, density in zip(*columns, strict=True)}


def _model_of(path: AnyPath) -> object:
    return summary(version_of(path))[0].get("model_hash")


def same_model(name: str, stores: Mapping[str, AnyPath]) -> list[str]:
    """The stores made with the same model as this one, it first; those that cannot be read are not
    among them."""
    model = _model_of(stores[name])
    found = [name]
    for other, path in stores.items():
        with suppress(SaescopeError, OSError):
            if model and other != name and _model_of(path) == model:
                found.append(other)
    return found


@st.cache_data(max_entries=16, ttl=_DAY, show_spinner="Reading the features' top tokens …")
def all_top_tokens(_store: FeatureStore, version: Version) -> dict[int, list[str]]:
    """The five commonest tokens of every feature's strongest examples."""
    return _store.top_tokens(range(_store.d_sae), 5)


def all_names(
    store: FeatureStore, notes: Annotations, version: Version, features: Sequence[int]
) -> list[str]:
    """What these features are called, many at once."""
    labels, tokens = notes.labels(), all_top_tokens(store, version)
    return [labels.get(f) or called(tokens[f]) for f in map(int, features)]


def found(store: FeatureStore, notes: Annotations, version: Version, text: str) -> list[int]:
    """The features that a search finds: by label and note, by top token, and by number; in this
    order."""
    numbers = [*notes.search(text), *matching(text, all_top_tokens(store, version))]
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < store.d_sae:
        numbers.append(int(text))
    return [number for number in dict.fromkeys(numbers) if number < store.d_sae]


def called(tokens: Sequence[str], most: int = 3) -> str:
    """The name of a feature without a label: its commonest top tokens.

    >>> called([" Paris", "Paris", " ", "\\n"])
    'Paris · ␣'
    """
    words = (plain_visible(token).strip() or "␣" for token in tokens[:most])
    return " · ".join(dict.fromkeys(words)) or "never fires"


@st.cache_data(max_entries=512, ttl=_DAY, show_spinner=False)
def picture(_store: FeatureStore, version: Version, document: int) -> bytes | None:
    """The thumbnail of a document."""
    return _store.picture(document)
