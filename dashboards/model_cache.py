"""The model and the SAE that a store was made with, loaded when a reader first types a text.

The store says which they are, but may come from a stranger: `dashboards.find_stores` decides
whether they may be loaded, and both must have the weights that the store was made with.
"""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from dashboards import find_stores
from saescope.errors import ArtefactError

if TYPE_CHECKING:
    from sae import TextFeatures
    from store import FeatureStore

# hooks are on the one model that all sessions share, so one text at a time
_LOCK = threading.Lock()


@dataclass(frozen=True)
class StoreOrigin:
    """The model and SAE of a store: where they are loaded from, and the hashes they must have."""

    model_spec: str
    sae_path: str
    site: str
    model_hash: str
    sae_hash: str
    revision: str | None
    target_site: str | None
    other_model: bool
    """whether the store was made on purpose with a model that the SAE was not trained on"""
    store: str


@dataclass(frozen=True)
class LoadedPair:
    """A store's model and SAE; `site` is where to use the SAE, None if the SAE itself says it."""

    model: Any
    sae: Any
    site: str | None


def origin_of(store: "FeatureStore") -> StoreOrigin:
    """The model and SAE of a store.

    Raises ArtefactError if the store does not say which model and SAE it was made with, or they may
    not be loaded (see `find_stores.source_to_load`).
    """
    meta, where = store.meta, str(store.path)
    wanted = ("model_spec", "sae_path", "site", "model_hash", "sae_hash")
    if not all(isinstance(meta.get(name), str) and meta[name] for name in wanted) or not all(
        isinstance(meta.get(name), str | None) for name in ("model_revision", "target_site")
    ):
        raise ArtefactError("does not say which model and SAE made it", where=where)
    return StoreOrigin(
        model_spec=find_stores.source_to_load("model", meta["model_spec"], where),
        sae_path=find_stores.source_to_load("sae", meta["sae_path"], where),
        revision=meta.get("model_revision"),
        target_site=meta.get("target_site"),
        other_model=meta.get("allow_other_model") is True,
        store=where,
        **{name: meta[name] for name in ("site", "model_hash", "sae_hash")},
    )


@st.cache_resource(max_entries=1, show_spinner="Loading the model and the SAE (once) …")
def load(what: StoreOrigin) -> LoadedPair:
    """Load both, which takes seconds: torch and transformers are imported.

    Raises ArtefactError if one of them is not what the store was made with.
    """
    import activations
    import sae
    from sae.data.provenance import check_indexed

    loaded = sae.load(what.sae_path, target_site=what.target_site)
    check_indexed(loaded, vars(what), where=what.store)
    site = None if loaded.transcodes or loaded.concatenates else what.site
    model = activations.load_model(what.model_spec, dtype="float32", revision=what.revision)
    if model.weights_hash != what.model_hash:
        raise ArtefactError(
            "this is not the model that the store was made with: its weights are others",
            where=what.model_spec,
        )
    return LoadedPair(model, loaded, site)


def features_of_text(store: "FeatureStore", text: str) -> "TextFeatures":
    """The features that fire on each token of a text.

    Raises ArtefactError if the store's model and SAE may not be loaded, or have other weights by
    now; InputError if the text is empty or too long.
    """
    import sae
    from sae.indexing.ends import by_ends

    what = origin_of(store)
    with _LOCK:
        pair = load(what)
        found = sae.features_of_text(
            pair.model, pair.sae, text, site=pair.site, allow_other_model=what.other_model
        )
        return by_ends(found, pair.sae.d_sae) if pair.sae.signed else found
