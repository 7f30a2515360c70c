"""Estimates of what a harvest will need (rows, disk, memory, time), made before it writes."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from activations.corpora.sequences import PackingCounts, Sequences
from activations.harvesting.compute import run_window
from activations.harvesting.config import HarvestConfig, in_planned_batches
from activations.harvesting.corpus_reader import CorpusReader
from activations.harvesting.outliers import norm_limits, outlier_facts
from activations.harvesting.row_selection import WindowRows
from activations.models.base import HarvestModel
from activations.models.config import stored
from activations.models.forward_memory import fitting_batch
from activations.storage.layout import SPLITS, array_names, row_arrays
from activations.storage.row_formats import StorageKind
from saescope.config import to_dict
from saescope.errors import InputError
from saescope.memory import physical_memory
from saescope.paths import AnyPath, as_path
from saescope.progress import Progress, as_size, duration, silent
from saescope.system import free_bytes

_WARM, _MEASURED = 1, 3
_SAMPLE_SEQUENCES = 64


@dataclass(frozen=True)
class Needs:
    """What sequences take on disk."""

    rows: int
    size: int
    """bytes"""


def needs(facts: Mapping[str, Any], planned: Mapping[str, int], share: float = 1.0) -> Needs:
    """Rows and bytes on disk of so many sequences of each split; all chunks are of full size.

    Args: share is that of the rows that there could be.
    """
    context, chunk_rows = facts["config"]["context"], facts["chunk_rows"]
    per_window = facts["sequences_per_window"]
    row_bytes = sum(each.nbytes for each in row_arrays(facts).values())
    rows = size = 0
    for sequences in planned.values():
        whole, rest = divmod(sequences, per_window)
        for inside, windows in ((per_window, whole), (rest, 1 if rest else 0)):
            kept = round(inside * _per_sequence(facts) * share)
            rows += windows * kept
            size += windows * -(-kept // chunk_rows) * chunk_rows * row_bytes
    # tokens, document, keep and split, and a description of each array
    tables = sum(planned.values()) * (context * (4 + 4 + 1) + 1)
    return Needs(rows, size + tables + 4096 * len(array_names(facts)))


def _per_sequence(facts: Mapping[str, Any]) -> int:
    """The most rows of a sequence; harvests from before this was said had one model and kind."""
    return int(facts.get("rows_per_sequence", facts["config"]["context"] - 1))


def check_space(
    facts: Mapping[str, Any],
    planned: Mapping[str, int],
    text: CorpusReader,
    model: HarvestModel,
    out: AnyPath,
) -> None:
    """Raise InputError if sequences of a text cannot fit on the disk of `out`."""
    free = free_bytes(out)
    if free is None or needs(facts, planned).size <= free:
        return
    (group,) = text.packed(
        "train", model, per_group=_SAMPLE_SEQUENCES, counts=PackingCounts(), limit=_SAMPLE_SEQUENCES
    )
    refuse_too_much(needs(facts, planned, _share(group, model, facts)), free, out)


def refuse_too_much(needed: Needs, free: int | None, out: AnyPath) -> None:
    """Raise InputError if this is more than there is."""
    if free is not None and needed.size > free:
        raise InputError(
            f"does not fit on the disk: {needed.rows:,} rows take {as_size(needed.size)}, and "
            f"{as_size(free)} are free. Ask for fewer tokens (max_tokens) or sites, or for "
            "another folder; --ignore-space harvests all the same, as far as it goes",
            where=str(out),
        )


def _share(group: Sequences, model: HarvestModel, facts: Mapping[str, Any]) -> float:
    """Of the rows that a group of sequences could have, those that it has."""
    rows = WindowRows(model, group, facts["config"].get("rows", "position"))
    return len(rows.flat_positions) / (len(group.tokens) * _per_sequence(facts))


def describe(
    config: HarvestConfig,
    facts: Mapping[str, Any],
    left: Mapping[str, int],
    text: CorpusReader,
    model: HarvestModel,
) -> tuple[list[str], Needs]:
    """Lines for people on what the rest of a harvest takes; a few batches are measured."""
    sites, config = tuple(facts["sites"]), in_planned_batches(config, facts)
    seconds, share = measured(config, facts, text, model)
    needed = needs(facts, left, share)
    tokens = sum(left.values()) * config.context
    width = 2 * sum(facts["sites"].values())
    window = facts["sequences_per_window"] * _per_sequence(facts) * width
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    most = " at most" if config.max_tokens is not None else ""
    lines = [
        f"{config.out}: {model.name} ({model.dtype_name}, {model.device.type}), "
        f"{len(sites)} site(s), {sum(facts['sites'].values())} numbers a row",
        *(
            f"{split.replace('_', ' '):<9}{left[split]:,} sequences, "
            f"{left[split] * config.context:,} tokens{most}"
            for split in SPLITS
        ),
        f"rows     about {needed.rows:,}, {share:.1%} of {_per_sequence(facts):,} a sequence",
        f"disk     {as_size(needed.size)}; {_room(free_bytes(as_path(config.out)))}",
        # one window is filled while another is written, a chunk at a time
        f"memory   about {as_size(peak + 2 * window + facts['chunk_rows'] * width)}; "
        f"{physical_memory() / 1e9:.0f} GB in this machine",
        f"time     {duration(tokens * seconds)}, from {_MEASURED} batches of "
        f"{config.batch_sequences} sequences ({1 / seconds:,.0f} tokens/s)",
    ]
    return lines, needed


def _room(free: int | None) -> str:
    return "an object store has no limit" if free is None else f"{as_size(free)} free"


def measured(
    config: HarvestConfig, facts: Mapping[str, Any], text: CorpusReader, model: HarvestModel
) -> tuple[float, float]:
    """Seconds a token, the median over a few batches, and the share of positions with a row."""
    batches, rows, sequences, times = _WARM + _MEASURED, 0, 0, []
    groups = text.packed(
        "train",
        model,
        per_group=config.batch_sequences,
        counts=PackingCounts(),
        limit=batches * config.batch_sequences,
    )
    sites, limits = tuple(facts["sites"]), norm_limits(facts)
    with silent(), Progress("measuring", 0) as progress:
        for group in groups:
            start = time.perf_counter()
            data = run_window(
                "train", group, 0, model, sites, config, (0,), progress, limits=limits
            )
            times.append((time.perf_counter() - start) / group.tokens.size)
            rows += len(data.order)
            sequences += len(group.tokens)
    measured = sorted(times[_WARM:] or times)
    return measured[len(measured) // 2], rows / (sequences * _per_sequence(facts))


_WINDOW_BYTES = 512 << 20
"""A window is made smaller than asked for if its rows would take more memory than this; two are in
memory at a time, one being filled and one being written."""


_CHUNK_BYTES = 768 << 20


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


def planned_facts(config: HarvestConfig, model: HarvestModel) -> dict[str, Any]:
    """What the manifest says from the start; everything that can be wrong is found here."""
    names = model.resolve(config.sites)
    model.check_rows(names, config.rows, config.context)
    sites = {site: model.d_in(site) for site in names}
    window_chunks = fitting_chunks(config.window_chunks, config.chunk_rows, sites, config.storage)
    per_sequence = model.rows_per_sequence(config.rows, config.context)
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
        "model": model.facts(),
        "sites": sites,
        "batch_sequences": batch,
        "rows_per_sequence": per_sequence,
        "chunk_rows": config.chunk_rows,
        "window_chunks": window_chunks,
        "sequences_per_window": sequences,
        "planned_sequences": CorpusReader.of(config).planned_sequences(model, config.max_tokens),
        **outlier_facts(config, model, names),
    }
