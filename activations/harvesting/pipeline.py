"""The harvest: run a model over a corpus and store the activations of some sites.

The main path, read downwards: `harvest` plans, `fill` goes through the windows that are missing
(`activations.harvesting.windows`), which are computed and written: while one is computed the one
before is written. `activations.harvesting.window_locks` has several processes do it,
`activations.append` does the same with new text for a harvest that is there.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from activations.corpora.documents import CorpusConfig
from activations.corpora.packing import JOINED, SEPARATE, PackingCounts
from activations.harvesting import window_locks
from activations.harvesting.corpus_reader import Text
from activations.harvesting.model_facts import check_same_model, facts_of
from activations.harvesting.outliers import outlier_facts
from activations.harvesting.plan import check_space
from activations.harvesting.resume import check_same_settings
from activations.harvesting.row_selection import RowKind, check_rows, rows_per_sequence
from activations.harvesting.segments import parts
from activations.harvesting.staging import Staging
from activations.harvesting.windows import MissingWindow, compute, missing_windows
from activations.models.base import RawModel
from activations.models.config import stored
from activations.models.forward_memory import (
    BATCH_SEQUENCES,
    check_batch_memory,
    fitting_batch,
    in_planned_batches,
)
from activations.models.language import Model, ModelConfig, load_model
from activations.storage.layout import PENDING, SPLITS, row_arrays
from activations.storage.reader import ActivationStore
from activations.storage.row_formats import StorageKind
from activations.storage.verify import holds_another
from activations.storage.writer import HarvestWriter, WindowData
from saescope.artefact import MANIFEST
from saescope.config import Config, to_dict
from saescope.errors import InputError, check_range
from saescope.leftovers import remove_leftovers
from saescope.paths import AnyPath, as_path, exists
from saescope.process_rank import this_rank
from saescope.progress import Progress, as_size, say, silent
from saescope.system import system_errors

_WINDOW_BYTES = 512 << 20
"""A window is made smaller than asked for if its rows would take more memory than this; two are in
memory at a time, one being filled and one being written."""
_CHUNK_BYTES = 768 << 20


@dataclass(frozen=True, kw_only=True)
class HarvestConfig(Config):
    """Run a model over text and store the activations of some sites."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The texts."""

    sites: tuple[str, ...] = ("blocks.9.hook_resid_post",)
    """Short or full TransformerLens names, modules, or patterns: resid_post:9, z:4-12,
    blocks.4-12.hook_mlp_out, module:encoder.layer.*:output (docs/reference/harvests.md)."""

    rows: RowKind = "position"
    """position: a row each kept position; mean: one each sequence, the mean over its kept positions
    (of a site without positions, its vector)."""

    out: str = "data/smollm2-135m-wikipedia"
    """Folder of the store, or a URL of one in an object store: s3://bucket/name."""

    context: int = 128
    """Positions of a sequence."""

    max_tokens: int | None = None
    """Stop after this many tokens, both splits together; without it, the whole corpus."""

    held_out_fraction: float = 0.05
    """Share of documents kept out of training, chosen by a hash of their text."""

    packing: Literal["joined", "separate"] = "joined"
    """joined: documents follow each other, EOS between them, and a sequence may have parts of
    several. separate: a sequence has one document only, and what is left of it is filled up with
    EOS, which is not stored."""

    prepend_bos: bool | None = None
    """Whether each sequence begins with BOS: by default where the model's tokenizer adds one. (SAEs
    of SAELens with prepend_bos on GPT-2 and its like want true.)"""

    outliers: float | None = None
    """Positions whose norm at any site exceeds so many times the site's median norm are not stored,
    and counted."""

    batch_sequences: int = BATCH_SEQUENCES
    """Sequences in one forward pass."""

    batch_memory: float | None = None
    """Instead of batch_sequences: GiB that one forward pass may take besides the weights."""

    chunk_rows: int = 16384
    """Rows (kept positions) of one chunk on disk."""

    window_chunks: int = 8
    """Chunks over which rows are shuffled, and that are committed together."""

    storage: StorageKind = "bfloat16"
    """How rows are stored: bfloat16; float32, which takes twice the disk; int8 with a scale a row,
    which takes half of it; or none: the text alone is stored, and its readers compute activations
    with the model, window by window."""

    statistics_windows: int | None = None
    """Windows, spread over the train split, that the sites' means and scales are taken over;
    without it, all. With storage none the model runs over these alone."""

    seed: int = 0
    """Decides the shuffling of rows."""

    def __post_init__(self) -> None:
        if not self.sites:
            raise InputError("name at least one site", where="sites", given=self.sites)
        if not self.out:
            raise InputError("empty", where="out", given=self.out, allowed="a folder")
        check_range("context", self.context, low=1)
        check_range("held_out_fraction", self.held_out_fraction, low=0, below=1)
        check_range("batch_sequences", self.batch_sequences, low=1)
        check_range("chunk_rows", self.chunk_rows, low=1)
        check_range("window_chunks", self.window_chunks, low=1)
        check_range("seed", self.seed, low=0)
        if self.batch_memory is not None:
            check_batch_memory(self.batch_memory, self.batch_sequences)
        if self.statistics_windows is not None:
            check_range("statistics_windows", self.statistics_windows, low=1)
        if self.packing not in (JOINED, SEPARATE):
            raise InputError(
                "no such packing", where="packing", given=self.packing, allowed=(JOINED, SEPARATE)
            )
        if self.outliers is not None:
            check_range("outliers", self.outliers, above=1)
        if self.max_tokens is not None:
            check_range("max_tokens", self.max_tokens, low=self.context)
        self._check_together()

    def _check_together(self) -> None:
        """Raise InputError for settings that exclude each other."""
        kind = self.model.kind
        if self.storage == "none" and not self.model.reads_tokens:
            raise InputError(
                "without stored rows a model must read tokens, which are stored",
                where="storage",
                given=f"{self.storage}, with model.kind {kind}",
                allowed="bfloat16, int8",
            )
        for where, given in (
            ("packing", self.packing != JOINED),
            ("prepend_bos", self.prepend_bos is not None),
            ("outliers", self.outliers is not None),
            ("corpus.deduplicate", self.corpus.deduplicate),
        ):
            if given and kind != "language":
                raise InputError("is for language models", where=where, given=f"model.kind {kind}")
        if self.outliers is not None and self.rows != "position":
            raise InputError(
                "are left out of rows of positions",
                where="outliers",
                given=f"rows = {self.rows}",
                allowed="rows = position",
            )


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
        return assist(config, lambda: begun(config, out))
    store = begun(config, out)
    if store is None or not store.complete:
        with window_locks.leading(out) as team:
            store = begun(config, out)  # another process may have written until now
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
            check_space(facts, facts["planned_sequences"], Text.of(config), model, out)
        remove_leftovers(out)
        writer = HarvestWriter.create(out, facts)
    else:
        writer = HarvestWriter(store)
        writer.trim()
    return fill(config, model, writer, team)


def model_of(config: HarvestConfig, store: ActivationStore | None) -> Model | RawModel:
    """The model of a configuration; of a harvest that is there, the same in the same precision.

    Raises InputError if it cannot be loaded, or is another one.
    """
    chosen = config.model
    dtype = chosen.dtype if store is None else store.manifest["model"]["dtype"]
    model = load_model(
        chosen.spec,
        dtype=dtype,
        device=window_locks.own_device(chosen.device),
        revision=chosen.revision,
        kind=chosen.kind,
        diffusion=chosen.diffusion,
        trust_remote_code=chosen.trust_remote_code,
    )
    if store is not None:
        check_same_model(model, store)
        model.products = store.manifest["model"].get("products", "own")  # older ones do not say
    return model


def fill(
    config: HarvestConfig,
    model: Model | RawModel,
    writer: HarvestWriter,
    team: window_locks.Team | None = None,
) -> ActivationStore:
    """Harvest what is missing of the last part of a store, and mark it as complete.

    Args: team is this process's place, the first, where several harvest.
    """
    store = writer.store
    part = parts(store)[-1]
    config = in_planned_batches(config, store.manifest)
    total = sum(part.planned_sequences.values()) * config.context
    done = store.n_tokens - part.first_sequence * config.context
    name = f"harvest of {len(store.sites)} site(s)" if len(store.sites) > 1 else "harvest"
    counts = {split: PackingCounts() for split in SPLITS}
    with Progress(name, total, "tokens", done=done) as progress:
        missing = missing_windows(part, config, model, store, counts)

        def run(window: MissingWindow) -> WindowData:
            return compute(window, model, config, store, progress)

        if team is None:
            _write_all(missing, run, writer)
        else:
            window_locks.lead(missing, run, writer, team, progress)
    text = Text.of(config, part)
    writer.finish({split: text.counted(count) for split, count in counts.items()})
    store = writer.store
    row = sum(each.nbytes for each in row_arrays(store.manifest).values())
    say(f"{store.path}: {store.n_rows():,} rows, {as_size(store.n_rows() * row)}")
    found = store.n_tokens - part.first_sequence * config.context
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
    out = window_locks.shared_folder(config.out)

    def opened() -> ActivationStore | None:
        store = find()
        ready = store is not None and (store.complete or (out / PENDING).exists())
        return store if ready else None

    def finished() -> ActivationStore | None:
        store = ActivationStore.open(out)
        return store if store.complete else None

    try:
        with silent(), window_locks.member(out) as team:
            store = team.wait_for(opened)
            if store.complete:
                return store
            model = model_of(config, store)
            config = in_planned_batches(config, store.manifest)
            counts = {split: PackingCounts() for split in SPLITS}
            missing = missing_windows(parts(store)[-1], config, model, store, counts)
            with Progress("harvest", 0, "tokens") as progress:
                window_locks.help_with(
                    missing,
                    lambda each: compute(each, model, config, store, progress),
                    Staging(store),
                    team,
                )
            return team.wait_for(finished)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # rank 0 says what there is to say


def begun(config: HarvestConfig, out: AnyPath) -> ActivationStore | None:
    """The harvest that `out` already holds, if any; it must be of this configuration."""
    if not exists(out / MANIFEST):
        if holds_another(out):
            raise InputError("exists and holds no harvest; choose another folder", where=str(out))
        return None
    store = ActivationStore.open(out)
    check_same_settings(store, config, ("out",))
    return store


def fitting_chunks(
    wanted: int, chunk_rows: int, sites: Mapping[str, int], storage: StorageKind
) -> int:
    """Chunks of a window: as many as wanted, or as fit in memory. InputError if not one does."""
    size = {"float32": 4}.get(storage, 2)
    row_bytes = size * sum(sites.values())
    if chunk_rows * row_bytes > _CHUNK_BYTES:
        raise InputError(
            "a chunk of all these sites does not fit in memory",
            where="chunk_rows",
            given=chunk_rows,
            allowed=f"up to {_CHUNK_BYTES // row_bytes}",
        )
    return min(wanted, max(1, _WINDOW_BYTES // (chunk_rows * row_bytes)))


def planned_facts(config: HarvestConfig, model: Model | RawModel) -> dict[str, Any]:
    """What the manifest says from the start; everything that can be wrong is found here."""
    names = model.resolve(config.sites)
    check_rows(model, names, config.rows, config.context)
    sites = {site: model.d_in(site) for site in names}
    window_chunks = fitting_chunks(config.window_chunks, config.chunk_rows, sites, config.storage)
    per_sequence = rows_per_sequence(model, config.rows, config.context)
    sequences = window_chunks * config.chunk_rows // per_sequence
    if sequences == 0:
        raise InputError(
            "a window holds less than one sequence",
            where="chunk_rows",
            given=config.chunk_rows,
            allowed=f"at least {-(-per_sequence // window_chunks)}",
        )
    batch = config.batch_sequences
    if config.batch_memory is not None:
        batch = fitting_batch(config.batch_memory, model, names, config.context, sequences)
    if sequences > batch:
        sequences -= sequences % batch
    return {
        "config": stored(to_dict(config)),
        "model": facts_of(model),
        "sites": sites,
        "batch_sequences": batch,
        "rows_per_sequence": per_sequence,
        "chunk_rows": config.chunk_rows,
        "window_chunks": window_chunks,
        "sequences_per_window": sequences,
        "planned_sequences": Text.of(config).planned_sequences(model, config.max_tokens),
        **outlier_facts(config, model, names),
    }
