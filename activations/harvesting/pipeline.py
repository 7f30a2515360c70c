"""The harvest: run a model over a corpus and store the activations of some sites.

The main path, read downwards: `harvest` plans, `fill` goes through the windows that are missing
(`activations.harvesting.windows`), which are computed and written: while one is computed the one
before is written. `activations.harvesting.window_locks` has several processes do it,
`activations.append` does the same with new text for a harvest that is there.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from activations.corpora.sequences import PackingCounts
from activations.harvesting import window_locks
from activations.harvesting.compute import compute
from activations.harvesting.config import (
    HarvestConfig,
    in_planned_batches,
)
from activations.harvesting.corpus_reader import CorpusReader
from activations.harvesting.plan import check_space, planned_facts
from activations.harvesting.resume import existing_harvest, model_of
from activations.harvesting.segments import segments
from activations.harvesting.staging import Staging
from activations.harvesting.windows import MissingWindow, missing_windows
from activations.harvesting.workers import help_with, lead
from activations.models.base import HarvestModel
from activations.storage.layout import SPLITS, row_arrays
from activations.storage.reader import ActivationStore
from activations.storage.window_data import WindowData
from activations.storage.writer import HarvestWriter
from saescope.leftovers import remove_leftovers
from saescope.paths import AnyPath, as_path
from saescope.process_rank import this_rank
from saescope.progress import Progress, as_size, say, silent
from saescope.system import system_errors


@system_errors()
def harvest(config: HarvestConfig, *, ignore_space: bool = False) -> ActivationStore:
    """Store the activations that a configuration asks for, and return the store.

    An interrupted harvest goes on from its last committed window; a complete one returns at once.
    Memory does not grow with the corpus.

    Raises InputError for a model, site, corpus or context that cannot be used (before anything is
    written), if `out` holds a harvest of another configuration, or if the disk has too little space
    for it (unless `ignore_space`); ArtefactError if the disk is full, or if another process writes
    to `out`.

    >>> config = HarvestConfig(sites=("blocks.4-9.hook_resid_post",), out="data/six")
    >>> store = harvest(config)  # doctest: +SKIP
    >>> store.n_rows("train"), store.d_in("blocks.9.hook_resid_post")  # doctest: +SKIP
    (1031337, 576)
    """
    out = as_path(config.out)
    if this_rank().number > 0:
        return assist(config, lambda: existing_harvest(config, out))
    store = existing_harvest(config, out)
    if store is None or not store.complete:
        with window_locks.leading(out) as team:
            store = existing_harvest(config, out)  # another process may have written until now
            if store is None or not store.complete:
                return _go_on(config, out, store, team, ignore_space=ignore_space)
    say(f"{out}: complete already, {store.n_rows():,} rows")
    return store


def _go_on(
    config: HarvestConfig,
    out: AnyPath,
    store: ActivationStore | None,
    team: window_locks.Team | None,
    *,
    ignore_space: bool,
) -> ActivationStore:
    """Begin a harvest, or go on with one, and finish it."""
    model = model_of(config, store)
    if store is None:
        facts = planned_facts(config, model)
        if not ignore_space:
            check_space(facts, facts["planned_sequences"], CorpusReader.of(config), model, out)
        remove_leftovers(out)
        writer = HarvestWriter.create(out, facts)
    else:
        writer = HarvestWriter(store)
        writer.trim()
    return fill(config, model, writer, team)


def fill(
    config: HarvestConfig,
    model: HarvestModel,
    writer: HarvestWriter,
    team: window_locks.Team | None = None,
) -> ActivationStore:
    """Harvest what is missing of the last part of a store, and mark it as complete.

    Args: team: this process as rank 0, if several processes harvest.
    """
    store = writer.store
    segment = segments(store)[-1]
    config = in_planned_batches(config, store.manifest)
    total = sum(segment.planned_sequences.values()) * config.context
    done = store.n_tokens - segment.first_sequence * config.context
    name = f"harvest of {len(store.sites)} site(s)" if len(store.sites) > 1 else "harvest"
    counts = {split: PackingCounts() for split in SPLITS}
    with Progress(name, total, "tokens", done=done) as progress:
        missing = missing_windows(segment, config, model, store, counts)

        def run(window: MissingWindow) -> WindowData:
            return compute(window, model, config, store, progress)

        if team is None:
            _write_all(missing, run, writer)
        else:
            lead(missing, run, writer, team, progress)
    text = CorpusReader.of(config, segment)
    writer.finish({split: text.counted(count) for split, count in counts.items()})
    store = writer.store
    row = sum(each.nbytes for each in row_arrays(store.manifest).values())
    say(f"{store.path}: {store.n_rows():,} rows, {as_size(store.n_rows() * row)}")
    found = store.n_tokens - segment.first_sequence * config.context
    if found < total:
        say(f"the corpus ended after {found:,} of the {total:,} tokens that were asked for")
    if store.n_rows("held_out") == 0:
        say("it has no held-out rows, which `saescope train` measures on: it will refuse it")
    return store


def _write_all(
    missing: Iterable[MissingWindow],
    run: Callable[[MissingWindow], WindowData],
    writer: HarvestWriter,
) -> None:
    """Compute and commit windows; while one is computed the one before is written."""
    with ThreadPoolExecutor(1, "harvest-writer") as pool:
        writing: Future[None] | None = None
        for window in missing:
            data = run(window)
            if writing is not None:
                writing.result()
            writing = pool.submit(writer.write, data)
        if writing is not None:
            writing.result()


def assist(config: HarvestConfig, find: Callable[[], ActivationStore | None]) -> ActivationStore:
    """Help rank 0 of several processes with its harvest, and return the store once it is complete.

    Args: find gives the store that rank 0 has begun, or is going on with, once there is one.

    Raises InputError if it is of another configuration or model; ArtefactError if rank 0 is gone,
    or another process has this rank.
    """
    out = window_locks.shared(config.out)

    def opened(team: window_locks.Team) -> ActivationStore | None:
        store = find()
        ready = store is not None and (store.complete or team.begun())
        return store if ready else None

    def finished() -> ActivationStore | None:
        store = ActivationStore.open(out)
        return store if store.complete else None

    try:
        with silent(), window_locks.member(out) as team:
            store = team.wait_for(lambda: opened(team))
            if store.complete:
                return store
            model = model_of(config, store)
            config = in_planned_batches(config, store.manifest)
            counts = {split: PackingCounts() for split in SPLITS}
            missing = missing_windows(segments(store)[-1], config, model, store, counts)
            with Progress("harvest", 0, "tokens") as progress:
                help_with(
                    missing,
                    lambda each: compute(each, model, config, store, progress),
                    Staging(store),
                    team,
                )
            return team.wait_for(finished)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # rank 0 says what there is to say
