"""`saescope search`: features whose label or note means about the same as a text."""

from dataclasses import dataclass

from activations.models import sentences
from saescope.config import Config
from saescope.errors import ArtefactError
from saescope.progress import say
from saescope.system import system_errors
from store.annotations import Annotations
from store.feature_store import FeatureStore
from store.meaning import search_meaning


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Config):
    """Search the labels and notes of a store by meaning."""

    store: str
    """A store's file or folder."""
    text: str
    """What to look for, in words."""
    limit: int = 10
    """How many features to print at most."""


@system_errors()
def search(config: SearchConfig) -> None:
    """Print the cosine, number and nearest label or note of features, the nearest first.

    Raises InputError for an empty text or a negative limit, ArtefactError where the model of
    sentences is not on this machine.
    """
    if not sentences.is_here():
        raise ArtefactError(
            f"search by meaning needs the model {sentences.NAME}, which is not on this machine: "
            f"get it with `{sentences.how_to_get()}`",
            where="search",
        )
    with FeatureStore.open(config.store) as store:
        path, sae_hash = store.path, str(store.meta.get("sae_hash") or "")
    embed = sentences.Sentences().embed
    with Annotations.open(path, sae_hash=sae_hash) as notes:
        found = search_meaning(
            notes, config.text, embed, model=sentences.MODEL_HASH, limit=config.limit
        )
    if not found:
        say("no feature has a label or note: `saescope label` makes labels")
    for each in found:
        say(f"{each.cosine:6.3f}  feature {each.feature}: {' '.join(each.text.split())}")
