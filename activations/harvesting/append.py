"""Appending new text to a finished harvest, with the same model, sites and settings."""

from typing import Any

from activations.harvesting import window_locks
from activations.harvesting.config import HarvestConfig
from activations.harvesting.corpus_reader import CorpusReader
from activations.harvesting.pipeline import assist, fill
from activations.harvesting.plan import check_space
from activations.harvesting.resume import check_same_settings, model_of
from activations.harvesting.segments import document_numbers, segments
from activations.models.base import HarvestModel
from activations.storage.layout import SPLITS
from activations.storage.reader import ActivationStore
from activations.storage.writer import HarvestWriter
from saescope.config import to_dict
from saescope.errors import InputError
from saescope.paths import AnyPath, as_path
from saescope.process_rank import this_rank
from saescope.progress import say
from saescope.system import system_errors


@system_errors()
def append(config: HarvestConfig, *, ignore_space: bool = False) -> ActivationStore:
    """Add the activations of another corpus to the harvest in `out`, and return the store.

    `config` is that of the harvest but for `corpus` and `max_tokens`, which are the new text's.
    What was harvested before stays as it is, to the byte; new windows of both splits follow it, and
    the manifest's `appended` lists what was added. Which split a new document belongs to is decided
    as before, so a text of the held-out split is never trained on when it comes again. The
    harvest is unfinished while it grows; an interrupted append goes on when it is called again.

    Raises InputError if there is no finished harvest, or other settings differ, or the text cannot
    be used; ArtefactError as `harvest` does.

    >>> more = CorpusConfig(source="news/*.jsonl")  # doctest: +SKIP
    >>> append(dataclasses.replace(config, corpus=more, max_tokens=None))  # doctest: +SKIP
    """
    out = as_path(config.out)
    if this_rank().number > 0:
        return assist(config, lambda: _existing(config, out))
    with window_locks.leading(out) as team:
        store = ActivationStore.open(out)
        if is_there(config, store):
            say(f"{out}: this text was appended already, {store.n_rows():,} rows")
            return store
        model = model_of(config, store)
        begins = store.complete
        entry = planned_segment(config, model, store) if begins else {}
        if begins and not ignore_space:
            planned = entry["planned_sequences"]
            check_space(store.manifest, planned, CorpusReader.of(config), model, out)
        writer = HarvestWriter(store)
        writer.trim()
        if begins:
            writer.begin(entry)
        return fill(config, model, writer, team)


def _existing(config: HarvestConfig, out: AnyPath) -> ActivationStore | None:
    """The harvest, once rank 0 has started to append this text or if the text is already in it."""
    store = ActivationStore.open(out)
    there = is_there(config, store)
    return store if there or not store.complete else None


def is_there(config: HarvestConfig, store: ActivationStore) -> bool:
    """Whether the text was harvested to its end; False if it is to be started or resumed."""
    check_same_settings(store, config, ("out", "corpus", "max_tokens"))
    known = [(segment.corpus, segment.max_tokens) for segment in segments(store)]
    wanted = (config.corpus, config.max_tokens)
    if not store.complete:
        if len(known) == 1 or known[-1] != wanted:
            raise InputError(
                "is not finished: run the command that was interrupted again, then append",
                where=str(store.path),
            )
        return False
    if config.corpus.deduplicate != known[0][0].deduplicate:
        raise InputError(
            "must be as in the harvest that grows",
            where="corpus.deduplicate",
            given=config.corpus.deduplicate,
            allowed=str(known[0][0].deduplicate).lower(),
        )
    return wanted in known


def planned_segment(
    config: HarvestConfig, model: HarvestModel, store: ActivationStore
) -> dict[str, Any]:
    """What the manifest says of a segment from its start; what is wrong with it is found here."""
    windows = range(len(store.windows))
    lists = [store.read_documents(number)["document"].to_numpy() for number in windows]
    first = 1 + max((int(ids.max()) for ids in lists if len(ids)), default=-1)
    before = {}
    if config.corpus.deduplicate:
        end = len(store.windows)
        before = {split: document_numbers(store, split, end_window=end) for split in SPLITS}
    text = CorpusReader.of(config)
    return {
        "corpus": to_dict(config.corpus),
        "max_tokens": config.max_tokens,
        "planned_sequences": text.planned_sequences(model, config.max_tokens, before),
        "first_window": len(store.windows),
        "first_sequence": store.n_sequences,
        "first_document": first,
    }
