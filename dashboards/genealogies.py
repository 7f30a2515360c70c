"""The features of a run followed back through its snapshots, for the pages that show them."""

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from dashboards import find_stores
from saescope.errors import ArtefactError
from store import FeatureStore
from store.genealogy import Genealogy
from store.matching import MATCHED

ABOUT = (
    "Each feature of the trained SAE is compared with all features of each snapshot, by the cosine "
    "of what they write. It is found in a snapshot where the largest of these cosines is at least "
    f"{MATCHED:g}, and it emerged at the first snapshot from which on it is found in every one."
)
_NEVER = "only at the end"
_SAE, _CHECKPOINTS, _CONFIG = "sae", "checkpoints", "config.json"


@dataclass(frozen=True)
class Emergence:
    """A run's genealogy, the tokens of its snapshots, and which SAE it is of."""

    found: Genealogy
    tokens: tuple[int, ...]
    """of each snapshot, and of the trained SAE [versions + 1]"""
    sae_hash: str

    @property
    def names(self) -> list[str]:
        """When a feature may have emerged, earliest first."""
        return [f"{each:,} tokens" for each in self.tokens[:-1]] + [_NEVER]


def run_of(store: FeatureStore) -> Path | None:
    """The folder of the run that a store's SAE, trained or a snapshot, is of.

    None where it is not known, is not here, or may not be loaded (`find_stores.source_to_load`).
    """
    own = store.meta.get("sae_path")
    if not isinstance(own, str) or not own:
        return None
    try:
        path = Path(find_stores.source_to_load("sae", own, str(store.path)))
    except ArtefactError:
        return None
    if path.name == _SAE:
        path = path.parent
    elif path.parent.name == _CHECKPOINTS:
        path = path.parent.parent
    return path if (path / _SAE).is_dir() or (path / _CHECKPOINTS).is_dir() else None


def snapshots(run: Path) -> list[Path]:
    """The configurations of a run's snapshots, without loading what trains."""
    return sorted((run / _CHECKPOINTS).glob(f"tokens-*/{_CONFIG}"))


def has_ended(run: Path) -> bool:
    """Whether a run has a trained SAE, whose features can be followed."""
    return (run / _SAE / _CONFIG).is_file()


def emergence(run: Path) -> Emergence:
    """The genealogy of a run's features.

    Cost: the first time, a second or so a snapshot for 4,096 features. Raises ArtefactError for a
    damaged SAE, InputError if there are no snapshots before the run's end.
    """
    files = [*snapshots(run), run / _SAE / _CONFIG]
    stamps = tuple(file.stat().st_mtime_ns for file in files)
    return _computed(str(run), stamps)


@st.cache_data(max_entries=8, show_spinner="Finding the features in each snapshot …")
def _computed(path: str, stamps: tuple[int, ...]) -> Emergence:
    del stamps  # what is in the folder, for the cache
    import sae
    from sae.analysis.dictionary_matching import decoder_directions
    from sae.commands.genealogy import named, snapshots_of
    from sae.data.provenance import weights_hash
    from store.genealogy import genealogy_of_directions

    kept = snapshots_of(path)
    last = sae.load(path)
    directions = [decoder_directions(each) for each in (*(sae.load(k.path) for k in kept), last)]
    found = genealogy_of_directions(directions, [named(each) for each in kept], match=False)
    trained = int(last.metadata.get("tokens_trained") or 0)
    return Emergence(found, (*(each.tokens for each in kept), trained), weights_hash(last))


@dataclass(frozen=True)
class Lineage:
    """Two SAEs of one run, of which one became the other."""

    tokens: tuple[int, int]
    """of the earlier and of the later"""
    first_is_later: bool
    """whether the first of the two is the later one"""


def lineage(first: FeatureStore, second: FeatureStore) -> Lineage | None:
    """How the SAEs of two stores follow one another; None where they are not known to be of one run
    and of two times."""
    one, two = (store.meta.get("tokens_trained") for store in (first, second))
    if not (isinstance(one, int) and isinstance(two, int)) or one == two:
        return None
    run = run_of(first)
    if run is None or run_of(second) != run:
        return None
    return Lineage((min(one, two), max(one, two)), one > two)
