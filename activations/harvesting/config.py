"""The configuration of a harvest, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from activations.corpora.documents import CorpusConfig
from activations.corpora.sequences import JOINED, SEPARATE
from activations.models.config import ModelConfig
from activations.storage.row_formats import StorageKind
from saescope.config import Config
from saescope.errors import InputError, check_choice, check_range

BATCH_SEQUENCES = 16
"""Sequences in one forward pass where no budget of memory says how many."""
RowKind = Literal["position", "mean"]


@dataclass(frozen=True, kw_only=True)
class HarvestConfig(Config):
    """Run a model over text and store the activations of some sites."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The texts."""

    sites: tuple[str, ...] = ("blocks.9.hook_resid_post",)
    """Short or full TransformerLens names, modules, or patterns: resid_post:9, z:4-12,
    blocks.4-12.hook_mlp_out, module:encoder.layer.*:output (docs/reference/sites.md)."""

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
        check_choice("no such packing", "packing", self.packing, (JOINED, SEPARATE))
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


def in_planned_batches(config: HarvestConfig, facts: Mapping[str, Any]) -> HarvestConfig:
    """The configuration of a harvest, with batches of the size that its manifest says."""
    batch = facts.get("batch_sequences", config.batch_sequences)
    return replace(config, batch_sequences=batch, batch_memory=None)


def check_batch_memory(gib: float, batch_sequences: int) -> None:
    """Raise InputError unless a budget can be used, and is the only thing said of the batch."""
    check_range("batch_memory", gib, above=0)
    if batch_sequences != BATCH_SEQUENCES:
        raise InputError(
            "the size of a batch is given twice",
            where="batch_memory",
            given=gib,
            allowed="batch_memory or batch_sequences",
        )
