"""The topics and sources of a harvest's documents, as a store keeps them."""

from collections.abc import Sequence

from activations import ActivationStore
from activations.corpora.topics import document_sources, document_topics
from saescope.progress import say
from store import StoreWriter
from store.fact_writer import MOST_GROUPS


def add_document_groups(writer: StoreWriter, harvest: ActivationStore, topic_field: str) -> None:
    """Write which topic and which source each document is of, where there are from 2 to 100."""
    table = harvest.document_table()
    numbers, keys = (table[name].to_pylist() for name in ("document", "key"))
    corpus = harvest.manifest["config"].get("corpus") or {}
    topics = document_topics(corpus, keys, topic_field)
    for kind, names in (("topic", topics), ("source", document_sources(corpus, keys))):
        _add(writer, kind, numbers, names)


def _add(
    writer: StoreWriter, kind: str, numbers: Sequence[int], names: Sequence[str | None]
) -> None:
    known = {n: name for n, name in zip(numbers, names, strict=True) if name}
    count = len(set(known.values()))
    if count > MOST_GROUPS:
        say(f"{kind}s of documents: left out, as there are {count:,}, more than {MOST_GROUPS}")
    elif count > 1:
        writer.add_document_groups(kind, list(known), list(known.values()))
