"""Growing a store after its harvest has grown: the activations of the old rows come from the store.

A harvest only grows at its end, and its ledger (`activations.storage.ledger`) with it. A store
notes how much of the ledger it was built from, and the sha256 of that: so it is known which chunks
are old, and that each is still the one that was encoded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activations import ActivationStore
from activations.storage.ledger import LEDGER_SINCE, Ledger
from sae.indexing.pending import Arrays, decisive, other_words
from saescope.artefact import DamagedError
from saescope.errors import ArtefactError, InputError
from saescope.progress import Progress
from store import FeatureStore

LEDGER = "harvest_ledger"
"""the meta value that says how much of the harvest's ledger a store was built from"""
_SEQUENCES = 4096


def ledger_meta(harvest: ActivationStore) -> dict[str, Any]:
    """What a store notes of its harvest, to grow with it; harvests without a ledger cannot."""
    known = harvest.manifest["schema"] >= LEDGER_SINCE
    return {LEDGER: harvest.ledger.committed} if known else {}


@dataclass(frozen=True)
class OldPart:
    """What of a harvest is in a store already: its first chunks, and its first sequences."""

    store: Path
    chunks: int
    sequences: int
    is_all: bool
    """whether the harvest has nothing else"""

    def activations(self) -> Iterator[Arrays]:
        """Positions, features and activations [n each] of the store, some at a time.

        Raises ArtefactError if they are not all there.
        """
        with (
            FeatureStore.open(self.store) as store,
            Progress("reading the old store", self.sequences, "sequences") as progress,
        ):
            count = 0
            for first in range(0, self.sequences, _SEQUENCES):
                end = min(first + _SEQUENCES, self.sequences)
                found = store.activations_between(first * store.context, end * store.context)
                count += len(found["position"])
                yield found
                progress.advance(end - first)
            store.database.check_fits(count == store.meta["n_activations"], "meta")


def old_part(path: Path, harvest: ActivationStore, meta: Mapping[str, Any]) -> OldPart:
    """What of a harvest is in the store at `path`, which is to grow; `meta` is what it will say.

    Raises InputError if there is no store, or it is of another SAE, site or model, or of a harvest
    that this one has not grown from; ArtefactError if it cannot be read.
    """
    if not path.exists():
        raise InputError(
            "there is no store that could grow; leave out --append", where=str(path.parent)
        )
    with FeatureStore.open(path) as store:
        old = store.meta
    words = [word for word in other_words(decisive(old), decisive(meta)) if word != "harvest"]
    if words:
        raise InputError(
            f"is a store of another {' and '.join(words)}, so its activations cannot stay; "
            "--replace builds it anew",
            where=str(path.parent),
        )
    ledger = _old_ledger(path, harvest, old.get(LEDGER))
    chunk_rows = int(harvest.manifest["chunk_rows"])
    chunks = sum(len(window.chunks(chunk_rows)) for window in ledger.windows)
    later = harvest.ledger.corrections[len(ledger.corrections) :]
    if any("chunk" in entry and entry["chunk"] < chunks for entry in later):
        raise InputError(
            "some of the rows that this store was built from were repaired with other content "
            "since; --replace builds it anew",
            where=str(path.parent),
        )
    return OldPart(
        path,
        chunks,
        sum(window.sequences for window in ledger.windows),
        len(ledger.windows) == len(harvest.windows),
    )


def _old_ledger(path: Path, harvest: ActivationStore, noted: Any) -> Ledger:
    if noted is None:
        raise ArtefactError(
            "does not say how much of its harvest it was built from, as it, or the harvest, was "
            "made by an older saescope; --replace builds it anew",
            where=str(path.parent),
        )
    try:
        return Ledger.of(harvest.path, {**harvest.manifest, "ledger": noted})
    except (DamagedError, KeyError, TypeError, ValueError):
        raise InputError(
            "was built from another harvest, not from the beginning of this one; --replace builds "
            "it anew",
            where=str(path.parent),
            given=str(harvest.path),
        ) from None
