"""The model and the SAE behind a store, loaded when a reader first types a text."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from saescope.errors import ArtefactError

if TYPE_CHECKING:
    from sae import TextFeatures
    from store import FeatureStore

# hooks are on the one model that all sessions share, so one text at a time
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Pair:
    """A model and an SAE that belong together."""

    model: Any
    sae: Any


@st.cache_resource(max_entries=1, show_spinner="Loading the model and the SAE (once) …")
def load(model_spec: str, sae_path: str, target_site: str | None) -> Pair:
    """Load both; this takes seconds, as torch and transformers are imported."""
    import activations
    import sae

    model = activations.load_model(model_spec, dtype="float32")
    return Pair(model, sae.load(sae_path, target_site=target_site))


def features_of_text(store: "FeatureStore", text: str) -> "TextFeatures":
    """The features that fire on each token of a text.

    Raises ArtefactError if the store does not say which model and SAE it was made from, InputError
    if the text is empty or too long.
    """
    spec = store.meta.get("model_spec") or store.meta.get("model")
    path = store.meta.get("sae_path")
    if not spec or not path:
        raise ArtefactError("does not say which model and SAE made it", where=str(store.path))
    import sae

    # a crosscoder has several, and its own; else the store's, which may be one of several layers
    site = None if store.meta.get("sites") else store.meta.get("site")
    with _LOCK:
        pair = load(str(spec), str(path), store.meta.get("target_site"))
        return sae.features_of_text(pair.model, pair.sae, text, site=site)
