"""The harvest: run a model over a corpus and store the activations of some sites.

The main path, read downwards: `harvest` plans, `_harvest_split` goes through the windows of a
split, `run_window` runs the model over one. While a window is computed the one before is written.
`activations.append` does the same with new text for a harvest that is there.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations.begun import check_same_model, check_same_settings
from activations.corpora import CorpusConfig
from activations.layout import SPLITS
from activations.models import Model, ModelConfig, load_model
from activations.outliers import Limits, norm_limits, outlier_facts, within
from activations.packing import JOINED, SEPARATE, PackingCounts, Sequences
from activations.parts import Part, numbers_before, parts
from activations.plan import check_space
from activations.reading import Text
from activations.zarr_store import ActivationStore
from activations.zarr_writer import HarvestWriter, SiteSums, WindowData
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
    """The language model."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The texts."""

    sites: tuple[str, ...] = ("blocks.9.hook_resid_post",)
    """TransformerLens names, or patterns such as blocks.4-12.hook_mlp_out."""

    out: str = "data/smollm2-135m-wikipedia"
    """Folder of the store."""

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

    outliers: float | None = None
    """Positions whose norm at any site exceeds so many times the site's median norm are not stored,
    and counted."""

    batch_sequences: int = 16
    """Sequences in one forward pass."""

    chunk_rows: int = 16384
    """Rows (kept positions) of one chunk on disk."""

    window_chunks: int = 8
    """Chunks over which rows are shuffled, and that are committed together."""

    seed: int = 0
    """Decides the shuffling of rows."""

    def __post_init__(self) -> None:
        if not self.sites:
            raise InputError("name at least one site", where="sites", given=self.sites)
        if not self.out:
            raise InputError("empty", where="out", given=self.out, allowed="a folder")
        check_range("context", self.context, low=2)
        check_range("held_out_fraction", self.held_out_fraction, low=0, below=1)
        check_range("batch_sequences", self.batch_sequences, low=1)
        check_range("chunk_rows", self.chunk_rows, low=1)
        check_range("window_chunks", self.window_chunks, low=1)
        check_range("seed", self.seed, low=0)
        if self.packing not in (JOINED, SEPARATE):
            raise InputError(
                "no such packing", where="packing", given=self.packing, allowed=(JOINED, SEPARATE)
            )
        if self.outliers is not None:
            check_range("outliers", self.outliers, above=1)
        if self.max_tokens is not None:
            check_range("max_tokens", self.max_tokens, low=self.context)


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
    out = Path(config.out)
    store = begun(config, out)
    if store is None or not store.complete:
        with locked(out, "harvest"):
            store = begun(config, out)  # another process may have written until now
            if store is None or not store.complete:
                return _go_on(config, out, store, ignore_space=ignore_space)
    say(f"{out}: complete already, {store.n_rows():,} rows")
    return store


def _go_on(
    config: HarvestConfig, out: Path, store: ActivationStore | None, *, ignore_space: bool
) -> ActivationStore:
    """Begin a harvest, or go on with one, and finish it."""
    model = model_of(config, store)
    if store is None:
        facts = planned_facts(config, model)
        if not ignore_space:
            check_space(facts, facts["planned_sequences"], Text.of(config), model, out)
        for path in out.parent.iterdir():
            if path.name.startswith(f".{out.name}.") and is_leftover(path):
                remove(path)
        writer = HarvestWriter.create(out, facts)
    else:
        writer = HarvestWriter(store)
        writer.trim()
    return fill(config, model, writer)


def model_of(config: HarvestConfig, store: ActivationStore | None) -> Model:
    """The model of a configuration; of a harvest that is there, the same in the same precision.

    Raises InputError if it cannot be loaded, or is another one.
    """
    chosen = config.model
    dtype = chosen.dtype if store is None else store.manifest["model"]["dtype"]
    model = load_model(chosen.spec, dtype=dtype, device=chosen.device, revision=chosen.revision)
    if store is not None:
        check_same_model(model, store)
    return model


def fill(config: HarvestConfig, model: Model, writer: HarvestWriter) -> ActivationStore:
    """Harvest what is missing of the last part of a store, and mark it as complete."""
    store = writer.store
    part = parts(store)[-1]
    total = sum(part.planned_sequences.values()) * config.context
    done = store.n_tokens - part.first_sequence * config.context
    name = f"harvest of {len(store.sites)} site(s)" if len(store.sites) > 1 else "harvest"
    with Progress(name, total, "tokens", done=done) as progress:
        counts = {
            split: _harvest_split(split, part, config, model, writer, progress) for split in SPLITS
        }
    text = Text.of(config, part)
    writer.finish({split: text.counted(count) for split, count in counts.items()})
    store = writer.store
    size = sum(store.n_rows() * store.d_in(site) * 2 for site in store.sites)
    say(f"{store.path}: {store.n_rows():,} rows, {size / 1e9:.2f} GB")
    return store


def begun(config: HarvestConfig, out: Path) -> ActivationStore | None:
    """The harvest that `out` already holds, if any; it must be of this configuration."""
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError("exists and holds no harvest; choose another folder", where=str(out))
        return None
    store = ActivationStore.open(out)
    check_same_settings(store, config, ("out",))
    return store


def planned_facts(config: HarvestConfig, model: Model) -> dict[str, Any]:
    """What the manifest says from the start; everything that can be wrong is found here."""
    if config.context > model.n_ctx:
        raise InputError(
            f"longer than the context of {model.name}", where="context", given=config.context,
            allowed=f"2 to {model.n_ctx}",
        )  # fmt: skip
    sites = {site: model.d_in(site) for site in model.resolve(config.sites)}
    row_bytes = 2 * sum(sites.values())
    if config.chunk_rows * row_bytes > _CHUNK_BYTES:
        raise InputError(
            "a chunk of all these sites does not fit in memory", where="chunk_rows",
            given=config.chunk_rows, allowed=f"up to {_CHUNK_BYTES // row_bytes}",
        )  # fmt: skip
    fitting = max(1, _WINDOW_BYTES // (config.chunk_rows * row_bytes))
    window_chunks = min(config.window_chunks, fitting)
    sequences = window_chunks * config.chunk_rows // (config.context - 1)
    if sequences == 0:
        raise InputError(
            "a window holds less than one sequence", where="chunk_rows", given=config.chunk_rows,
            allowed=f"at least {-(-(config.context - 1) // window_chunks)}",
        )  # fmt: skip
    if sequences > config.batch_sequences:
        sequences -= sequences % config.batch_sequences
    return {
        "config": to_dict(config),
        "model": _model_facts(model),
        "sites": sites,
        "chunk_rows": config.chunk_rows,
        "window_chunks": window_chunks,
        "sequences_per_window": sequences,
        "planned_sequences": Text.of(config).planned_sequences(model, config.max_tokens),
        **outlier_facts(config, model, list(sites)),
    }


def _model_facts(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "spec": model.spec,
        "revision": model.revision,
        "weights_hash": model.weights_hash,
        "tokenizer_hash": model.tokenizer_hash,
        "dtype": model.dtype_name,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "special_token_ids": sorted(model.special_token_ids),
        "n_ctx": model.n_ctx,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "d_vocab": model.d_vocab,
    }


def _harvest_split(
    split: str,
    part: Part,
    config: HarvestConfig,
    model: Model,
    writer: HarvestWriter,
    progress: Progress,
) -> PackingCounts:
    """Compute and commit the windows of a split that are not committed yet."""
    begun = writer.store
    committed = [begun.windows[number] for number in part.windows(begun, split)]
    earlier = sum(w.split == split for w in begun.windows[: part.first_window])
    # a place is that of the last window that was committed, which is thus read and compared again
    place = begun.manifest.get("places", {}).get(split) if committed else None
    at = 0 if place is None else len(committed) - 1
    counts = PackingCounts()
    per_window = begun.manifest["sequences_per_window"]
    groups = Text.of(config, part).packed(
        split, model, per_group=per_window, counts=counts, limit=part.planned_sequences[split],
        before=numbers_before(begun, part, split, place), place=place,
        to_end=part.max_tokens is None,
    )  # fmt: skip
    limits = norm_limits(begun.manifest)
    with ThreadPoolExecutor(1, "harvest-writer") as pool:
        writing: Future[None] | None = None
        for number, group in enumerate(groups, start=at):
            if number < len(committed):
                _check_same_text(group, begun, committed[number].first_sequence)
                continue
            seed = (config.seed, SPLITS.index(split), earlier + number)
            first = begun.n_sequences + per_window * (number - len(committed))
            data = run_window(
                split, group, first, model, begun.sites, config, seed, progress, limits=limits
            )
            if writing is not None:
                writing.result()
            writing = pool.submit(writer.write, data)
        if writing is not None:
            writing.result()
    return counts


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
    model: Model,
    sites: tuple[str, ...],
    config: HarvestConfig,
    seed: tuple[int, ...],
    progress: Progress,
    *,
    limits: Limits | None = None,
    keep: Tensor | None = None,
) -> WindowData:
    """Run the model over a window's sequences and keep the rows that count.

    Those are the positions of `keep` [sequence, position], or all that are no special tokens, whose
    norms are within the limits of all sites.
    """
    tokens = torch.from_numpy(group.tokens)
    keep = model.keep_mask(tokens) if keep is None else keep
    candidates = int(keep.sum())
    rows = {site: _SiteRows(site, candidates, model.d_in(site)) for site in sites}
    for start in range(0, len(tokens), config.batch_sequences):
        batch = slice(start, start + config.batch_sequences)
        found = model.capture(tokens[batch], sites)
        if limits is not None:
            keep[batch] &= within(found, limits)
        chosen = keep[batch].flatten().nonzero()[:, 0].to(model.device)
        for site, x in found.items():
            rows[site].append(x.flatten(0, 1).index_select(0, chosen))
        progress.advance(tokens[batch].numel())
    kept = keep.flatten().nonzero()[:, 0]
    if len(kept) == 0:
        raise InputError("no position of a whole window is kept", where=config.corpus.source)
    return WindowData(
        split=split,
        tokens=group.tokens,
        document=group.document,
        keep=keep.numpy(),
        described=group.described,
        row_token=first_sequence * config.context + kept.numpy(),
        rows={site: part.bits[: len(kept)] for site, part in rows.items()},
        order=np.random.default_rng(seed).permutation(len(kept)),
        sums={site: part.sums() for site, part in rows.items()},
        positions=group.positions(candidates, len(kept)),
        place=group.place,
    )


class _SiteRows:
    """The rows of one site in one window, as bfloat16 bits, and their sums."""

    def __init__(self, site: str, rows: int, d_in: int) -> None:
        self._site = site
        self._filled = 0
        self._total = torch.zeros(d_in, dtype=torch.float64)
        self._square = 0.0
        self.bits: NDArray[np.uint16] = np.empty((rows, d_in), np.uint16)

    def append(self, x: Tensor) -> None:
        """Add rows [n, d_in]; the sums are of what is stored, after rounding to bfloat16."""
        stored = x.to(torch.bfloat16)
        rounded = stored.float()
        total = rounded.sum(0, dtype=torch.float64).cpu()
        square = float(rounded.flatten().square_().sum(dtype=torch.float64))
        if not np.isfinite(square):
            raise InputError(
                "activations are not finite; try another model.dtype", where=self._site,
                given=str(x.dtype).removeprefix("torch."),
            )  # fmt: skip
        self._total += total
        self._square += square
        last = self._filled + len(x)
        self.bits[self._filled : last] = stored.cpu().view(torch.uint16).numpy()
        self._filled = last

    def sums(self) -> SiteSums:
        return SiteSums(self._filled, self._total.numpy(), self._square)
