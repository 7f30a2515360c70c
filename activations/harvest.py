"""The harvest: run a model over a corpus and store the activations of some sites.

The main path, read downwards: `harvest` plans, `_harvest_split` goes through the windows of a
split, `run_window` runs the model over one. While a window is computed the one before is written.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from activations.batch_size import BATCH_SEQUENCES, check_batch_memory, fitting_batch
from activations.corpora import CorpusConfig, Document, documents
from activations.layout import SPLITS, row_arrays
from activations.model_facts import check_same_model, facts_of
from activations.models import Model, ModelConfig, load_model
from activations.packing import PackingCounts, Sequences, pack
from activations.raw_models import RawModel
from activations.row_storage import SiteRows, StorageKind
from activations.rows import RowKind, WindowRows, check_rows, rows_per_sequence
from activations.zarr_store import ActivationStore
from activations.zarr_writer import HarvestWriter, WindowData
from saescope.artefact import MANIFEST, is_leftover, locked, remove
from saescope.config import Config, to_dict
from saescope.errors import ArtefactError, InputError, check_range
from saescope.progress import Progress, say

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
    blocks.4-12.hook_mlp_out, module:encoder.layer.*:output (docs/harvests.md)."""

    rows: RowKind = "position"
    """position: a row each kept position; mean: one each sequence, the mean over its kept positions
    (of a site without positions, its vector)."""

    out: str = "data/smollm2-135m-wikipedia"
    """Folder of the store."""

    context: int = 128
    """Positions of a sequence."""

    max_tokens: int | None = None
    """Stop after this many tokens, both splits together; without it, the whole corpus."""

    held_out_fraction: float = 0.05
    """Share of documents kept out of training, chosen by a hash of their text."""

    batch_sequences: int = BATCH_SEQUENCES
    """Sequences in one forward pass."""

    batch_memory: float | None = None
    """Instead of batch_sequences: GiB that one forward pass may take besides the weights."""

    chunk_rows: int = 16384
    """Rows (kept positions) of one chunk on disk."""

    window_chunks: int = 8
    """Chunks over which rows are shuffled, and that are committed together."""

    storage: StorageKind = "bfloat16"
    """How rows are stored: bfloat16; int8 with a scale a row, which takes half the disk; or none:
    the text alone is stored, and its readers compute activations with the model, window by window.
    """

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
        if self.storage == "none" and not self.model.reads_tokens:
            raise InputError(
                "without stored rows a model must read tokens, which are stored", where="storage",
                given=f"{self.storage}, with model.kind {self.model.kind}",
                allowed="bfloat16, int8",
            )  # fmt: skip
        if self.batch_memory is not None:
            check_batch_memory(self.batch_memory, self.batch_sequences)
        check_range("chunk_rows", self.chunk_rows, low=1)
        check_range("window_chunks", self.window_chunks, low=1)
        check_range("seed", self.seed, low=0)
        if self.statistics_windows is not None:
            check_range("statistics_windows", self.statistics_windows, low=1)
        if self.max_tokens is not None:
            check_range("max_tokens", self.max_tokens, low=self.context)


def harvest(config: HarvestConfig) -> ActivationStore:
    """Store the activations that a configuration asks for, and return the store.

    An interrupted harvest goes on from its last committed window; a complete one returns at once.
    Memory does not grow with the corpus.

    Raises InputError for a model, site, corpus or context that cannot be used (before anything is
    written), or if `out` holds a harvest of another configuration; ArtefactError if the disk is
    full, or if another process writes to `out`.

    >>> config = HarvestConfig(sites=("blocks.4-9.hook_resid_post",), out="data/six")
    >>> store = harvest(config)  # doctest: +SKIP
    >>> store.n_rows("train"), store.d_in("blocks.9.hook_resid_post")  # doctest: +SKIP
    (1031337, 576)
    """
    out = Path(config.out)
    begun = _begun(config, out)
    if begun is None or not begun.complete:
        with locked(out, "harvest"):
            begun = _begun(config, out)  # another process may have written until now
            if begun is None or not begun.complete:
                return _go_on(config, out, begun)
    say(f"{out}: complete already, {begun.n_rows():,} rows")
    return begun


def _go_on(config: HarvestConfig, out: Path, begun: ActivationStore | None) -> ActivationStore:
    """Begin a harvest, or go on with one, and finish it."""
    dtype = config.model.dtype if begun is None else begun.manifest["model"]["dtype"]
    model = load_model(
        config.model.spec,
        dtype=dtype,
        device=config.model.device,
        revision=config.model.revision,
        kind=config.model.kind,
        diffusion=config.model.diffusion,
    )
    if begun is None:
        for path in out.parent.iterdir():
            if path.name.startswith(f".{out.name}.") and is_leftover(path):
                remove(path)
        writer = HarvestWriter.create(out, _plan(config, model))
    else:
        check_same_model(model, begun)
        writer = HarvestWriter(begun)
        writer.trim()
    store = writer.store
    total = sum(store.manifest["planned_sequences"].values()) * config.context
    name = f"harvest of {len(store.sites)} site(s)" if len(store.sites) > 1 else "harvest"
    with Progress(name, total, "tokens", done=store.n_tokens) as progress:
        counts = {split: _harvest_split(split, config, model, writer, progress) for split in SPLITS}
    writer.finish({split: counted(count) for split, count in counts.items()})
    store = writer.store
    row = sum(each.nbytes for each in row_arrays(store.manifest).values())
    say(f"{out}: {store.n_rows():,} rows, {store.n_rows() * row / 1e9:.2f} GB")
    return store


def _begun(config: HarvestConfig, out: Path) -> ActivationStore | None:
    """The harvest that `out` already holds, if any; it must be of this configuration."""
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError("exists and holds no harvest; choose another folder", where=str(out))
        return None
    store = ActivationStore.open(out)
    # a harvest that is older than a setting was made with what is its default
    there = _flat(to_dict(HarvestConfig())) | _flat(store.manifest["config"])
    here = _flat(to_dict(config))
    names = [n for n in {**there, **here} if n != "out" and there.get(n) != here.get(n)]
    if names:
        what = ", ".join(f"{n} is {there.get(n)!r} there and {here.get(n)!r} here" for n in names)
        raise InputError(
            f"holds a harvest of another configuration: {what}. Choose another out, or remove it",
            where=str(out),
        )
    return store


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        flat |= {} if isinstance(value, dict) else {prefix + name: value}
    return flat


def _plan(config: HarvestConfig, model: Model | RawModel) -> dict[str, Any]:
    """What the manifest says from the start; everything that can be wrong is found here."""
    names = model.resolve(config.sites)
    check_rows(model, names, config.rows, config.context)
    sites = {site: model.d_in(site) for site in names}
    row_bytes = 2 * sum(sites.values())
    if config.chunk_rows * row_bytes > _CHUNK_BYTES:
        raise InputError(
            "a chunk of all these sites does not fit in memory", where="chunk_rows",
            given=config.chunk_rows, allowed=f"up to {_CHUNK_BYTES // row_bytes}",
        )  # fmt: skip
    fitting = max(1, _WINDOW_BYTES // (config.chunk_rows * row_bytes))
    window_chunks = min(config.window_chunks, fitting)
    per_sequence = rows_per_sequence(model, config.rows, config.context)
    sequences = window_chunks * config.chunk_rows // per_sequence
    if sequences == 0:
        raise InputError(
            "a window holds less than one sequence", where="chunk_rows", given=config.chunk_rows,
            allowed=f"at least {-(-per_sequence // window_chunks)}",
        )  # fmt: skip
    batch = config.batch_sequences
    if config.batch_memory is not None:
        batch = fitting_batch(config.batch_memory, model, names, config.context, sequences)
    if sequences > batch:
        sequences -= sequences % batch
    return {
        "config": to_dict(config),
        "model": facts_of(model),
        "sites": sites,
        "batch_sequences": batch,
        "chunk_rows": config.chunk_rows,
        "window_chunks": window_chunks,
        "sequences_per_window": sequences,
        "planned_sequences": _planned_sequences(config, model),
    }


def _planned_sequences(config: HarvestConfig, model: Model | RawModel) -> dict[str, int]:
    """How many sequences each split is to have (with max_tokens: at most).

    Without max_tokens the corpus is read through once to count, which costs about 1/200 of what
    running the model over it does, and finds a damaged record before hours of work.
    """
    if config.max_tokens is None:
        say("counting the tokens of the corpus")
        limits: dict[str, int | None] = dict.fromkeys(SPLITS)
    else:
        wanted = config.max_tokens // config.context
        held_out = round(wanted * config.held_out_fraction)
        limits = {"train": wanted - held_out, "held_out": held_out}
    planned = {}
    for split, limit in limits.items():
        # with a limit it is enough to know that there is text for one sequence
        read = min(limit, 1) if limit is not None else None
        found = packed(split, config, model, 64, PackingCounts(), read)
        number = sum(len(group.tokens) for group in found)
        planned[split] = number if limit is None else limit * min(number, 1)
    if planned["train"] == 0:
        raise InputError(
            f"not enough text for one training sequence of {config.context} tokens",
            where=config.corpus.source,
        )
    if planned["held_out"] == 0 and config.held_out_fraction > 0:
        say("the corpus is too small for a held-out sequence: everything is for training")
    return planned


def packed(
    split: str,
    config: HarvestConfig,
    model: Model | RawModel,
    per_group: int,
    counts: PackingCounts,
    limit: int | None,
) -> Iterator[Sequences]:
    """The sequences of one split's documents, always the same ones."""
    raw = model if isinstance(model, RawModel) else None

    def chosen() -> Iterator[Document]:
        held_out = split == "held_out"
        for document in (raw.documents if raw else documents)(config.corpus):
            if document.is_held_out(config.held_out_fraction) == held_out:
                yield document

    if limit == 0:
        return iter(())
    if raw:
        return raw.sequences(
            chosen(), context=config.context, per_group=per_group, counts=counts, limit=limit
        )
    assert isinstance(model, Model)
    return pack(
        chosen(), model, context=config.context, per_group=per_group, counts=counts, limit=limit
    )


def counted(counts: PackingCounts) -> dict[str, Any]:
    return {
        "documents": counts.documents,
        "tokens": counts.tokens,
        "dropped_tokens": counts.dropped_tokens,
        "hash": counts.digest.hexdigest(),
    }


def _harvest_split(
    split: str,
    config: HarvestConfig,
    model: Model | RawModel,
    writer: HarvestWriter,
    progress: Progress,
) -> PackingCounts:
    """Compute and commit the windows of a split that are not committed yet."""
    begun = writer.store
    # a resumed harvest runs batches of the size that it began with
    batch = begun.manifest.get("batch_sequences", config.batch_sequences)
    config = replace(config, batch_sequences=batch, batch_memory=None)
    committed = [window for window in begun.windows if window.split == split]
    counts = PackingCounts()
    limit = begun.manifest["planned_sequences"][split]
    per_window = begun.manifest["sequences_per_window"]
    groups = packed(split, config, model, per_window, counts, limit)
    with ThreadPoolExecutor(1, "harvest-writer") as pool:
        writing: Future[None] | None = None
        for number, group in enumerate(groups):
            if number < len(committed):
                _check_same_text(group, begun, committed[number].first_sequence)
                continue
            seed = (config.seed, SPLITS.index(split), number)
            first = begun.n_sequences + per_window * (number - len(committed))
            measured = _is_measured(split, number, begun)
            sites = begun.sites if measured or config.storage != "none" else ()
            data = run_window(split, group, first, model, sites, config, seed, progress)
            if not measured:
                data = replace(data, sums={})
            if writing is not None:
                writing.result()
            writing = pool.submit(writer.write, data)
        if writing is not None:
            writing.result()
    return counts


def _is_measured(split: str, number: int, begun: ActivationStore) -> bool:
    """Whether the statistics are of this window, among others, of a split."""
    wanted = begun.manifest["config"].get("statistics_windows")
    planned = begun.manifest["planned_sequences"][split]
    total = -(-planned // begun.manifest["sequences_per_window"])
    if split != "train" or wanted is None or wanted >= total:
        return split == "train"
    return number in {n * total // wanted for n in range(wanted)}


def _check_same_text(group: Sequences, begun: ActivationStore, first: int) -> None:
    if not np.array_equal(group.tokens, begun.tokens[first : first + len(group.tokens)]):
        raise ArtefactError(
            "the corpus has changed since this harvest began; remove it and begin anew",
            where=str(begun.path),
        )


def run_window(
    split: str,
    group: Sequences,
    first_sequence: int,
    model: Model | RawModel,
    sites: tuple[str, ...],
    config: HarvestConfig,
    seed: tuple[int, ...],
    progress: Progress,
) -> WindowData:
    """Run the model over a window's sequences and keep the rows that count."""
    window = WindowRows(model, group, config.rows)
    if len(window.places) == 0:
        raise InputError("nothing but special tokens", where=config.corpus.source)
    places = window.places
    rows = {site: SiteRows(site, len(places), model.d_in(site), config.storage) for site in sites}
    for start in range(0, len(window.running), config.batch_sequences):
        batch = window.running[start : start + config.batch_sequences]
        found = model.capture(model.inputs(group, batch), sites)
        for site, x in found.items():
            rows[site].append(window.of(site, x, batch))
        progress.advance(len(batch) * config.context)
    return WindowData(
        split=split,
        tokens=group.tokens,
        document=group.document,
        keep=window.keep,
        described=group.described,
        row_token=first_sequence * config.context + places,
        rows={name: x for part in rows.values() for name, x in part.arrays.items()},
        order=window.order(seed),
        sums={site: part.sums() for site, part in rows.items()},
    )
