"""Repair a harvest: recompute what is damaged, and put it back if it has the committed checksum.

A chunk's row order follows from the harvest's seed and its rows from the stored tokens, so that a
damaged chunk of a site needs the model and one window; damaged tokens, or a list of documents, need
the corpus. What was computed is written where its checksum is the one that was committed. Where it
is not, this machine or its libraries round otherwise (or the harvest was of something else): then
it is written only if asked for, and the ledger says so from then on.
"""

import hashlib
import itertools
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from activations.corpora.sequences import PackingCounts, Sequences
from activations.harvesting.config import HarvestConfig
from activations.harvesting.corpus_reader import CorpusReader
from activations.harvesting.outliers import norm_limits
from activations.harvesting.row_selection import WindowRows
from activations.harvesting.segments import Segment, numbers_before, segments
from activations.models.base import HarvestModel
from activations.recompute.window import config_of, group_of, model_of, recompute
from activations.storage.chunk_files import chunk_path, crc32c, write_chunk
from activations.storage.documents import write_documents
from activations.storage.files import checksums, descriptions
from activations.storage.layout import (
    GROUP,
    METADATA,
    SEQUENCE_ARRAYS,
    SPLITS,
    document_schema,
    row_arrays,
)
from activations.storage.ledger import LEDGER, Window, correction_line, window_line
from activations.storage.reader import ActivationStore
from activations.storage.verify import Fault, Report
from activations.storage.window_data import WindowData, dealt, filled_up
from activations.storage.writer import HarvestWriter
from saescope.artefact import DamagedError, library_versions, read_json, write_json
from saescope.errors import ArtefactError, SaescopeError
from saescope.paths import AnyPath, cut
from saescope.progress import Progress, say
from saescope.system import system_errors


@dataclass
class Agreement:
    """How recomputed chunks of an array of a site compare with stored ones that are whole."""

    chunks: int = 0
    values: int = 0
    differing: int = 0
    largest: float = 0.0

    def add(self, stored: NDArray[Any], found: NDArray[Any]) -> None:
        """Compare rows of an array of a site: bits of bfloat16, int8, or scales."""
        one, other = (_numbers(torch.from_numpy(x)) for x in (stored, found))
        self.chunks += 1
        self.values += stored.size
        self.differing += int((stored != found).sum())
        self.largest = max(self.largest, float((one - other).abs().nan_to_num().max()))

    def __str__(self) -> str:
        if not self.chunks:
            return "the window has no undamaged chunk of this array to compare with"
        return (
            f"in {self.chunks} undamaged chunks {self.differing:,} of {self.values:,} values "
            f"differ, by {self.largest:.2g} at most"
        )


def _numbers(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.bfloat16).float() if x.dtype == torch.uint16 else x.float()


@dataclass
class Repair:
    """One repair of a store, whose lock the caller holds."""

    store: ActivationStore
    report: Report
    allow_rounding: bool = False
    device: str | None = None
    trusted: bool = False
    """whether the code that comes with the model may be run"""
    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Repair what can be; `done` and `left` then say what was, and what was not and why."""
        try:
            with system_errors(str(self.store.path)):
                self._descriptions()
                self._texts()
                self._rows()
        except OSError as error:
            raise ArtefactError(
                f"cannot be written: {error}", where=str(self.store.path)
            ) from error

    @cached_property
    def config(self) -> HarvestConfig:
        """The configuration of the harvest."""
        return config_of(self.store)

    @cached_property
    def model(self) -> HarvestModel:
        """The model of the harvest, by its hash."""
        return model_of(self.store, self.device, trust_remote_code=self.trusted)

    def _faults(self, *arrays: str) -> list[Fault]:
        return [
            fault
            for fault in self.report.faults
            if fault.array in arrays and fault.chunk is not None and fault.kind != "foreign"
        ]

    def _descriptions(self) -> None:
        expected = descriptions(self.store)
        for fault in self.report.faults:
            if fault.chunk is None and fault.array in expected:
                path = self.store.path / GROUP / fault.array / METADATA
                write_json(path, expected[fault.array])
                self.done.append(fault.path)
            if fault.path == LEDGER:
                cut(self.store.path / LEDGER, self.store.ledger.size)
                self.done.append(fault.path)

    # tokens, documents, keep, split and lists of documents: from the corpus

    def _texts(self) -> None:
        chunks = self._faults(*SEQUENCE_ARRAYS)
        lists = self._faults("documents")
        numbers = {fault.chunk for fault in chunks}
        per_chunk = int(self.store.manifest["sequences_per_window"])
        wanted = {fault.chunk for fault in lists}
        for number, window in enumerate(self.store.windows):
            if any(piece.chunk in numbers for piece in window.pieces(per_chunk)):
                wanted.add(number)
        if not wanted:
            return
        try:
            groups = dict(self._groups(wanted))
        except SaescopeError as error:
            self.left += [f"{fault.path}: the text cannot be had: {error}" for fault in lists]
            self.left += [f"{fault.path}: the text cannot be had: {error}" for fault in chunks]
            return
        for fault in chunks:
            self._rewrite_sequences(fault, groups)
        for fault in lists:
            self._rewrite_list(fault, groups[fault.chunk or 0])

    def _groups(self, wanted: set[int | None]) -> Iterator[tuple[int, Sequences]]:
        """The packed sequences of some windows, from the corpus."""
        for segment in segments(self.store):
            for split in SPLITS:
                numbers = segment.windows(self.store, split)
                if wanted & set(numbers):
                    say(f"reading the {split} text again")
                    yield from self._groups_of(segment, split, numbers, wanted)

    def _groups_of(
        self, segment: Segment, split: str, numbers: Sequence[int], wanted: set[int | None]
    ) -> Iterator[tuple[int, Sequences]]:
        """The packed sequences of some windows of a split of one part."""
        text, counts = CorpusReader.of(self.config, segment), PackingCounts()
        groups = text.packed(
            split,
            self.model,
            per_group=self.store.manifest["sequences_per_window"],
            counts=counts,
            limit=segment.planned_sequences[split],
            before=numbers_before(self.store, segment, split, None),
            to_end=segment.max_tokens is None,
        )
        for position, group in enumerate(groups):
            if position >= len(numbers):
                break
            if numbers[position] in wanted:
                self._check_text(numbers[position], group, segment.corpus.source)
                yield numbers[position], group
        if segment.counts is not None and not text.agrees(counts, segment.counts[split]):
            raise ArtefactError(
                "the corpus is not the one that was harvested (its hash differs)",
                where=segment.corpus.source,
            )

    def _check_text(self, number: int, group: Sequences, source: str) -> None:
        window = self.store.windows[number]
        for array, found in self._sequence_values(number, group).items():
            for piece in window.pieces(int(self.store.manifest["sequences_per_window"])):
                crc = self.store.ledger.sequences_crc(array, number, piece)
                stored = found[piece.offset : piece.offset + piece.sequences]
                if len(found) != window.sequences or crc not in (None, crc32c(stored)):
                    raise ArtefactError(
                        f"the corpus is not the one that was harvested ({array} of window {number} "
                        "differ)",
                        where=source,
                    )

    def _sequence_values(self, number: int, group: Sequences) -> dict[str, NDArray[Any]]:
        window = self.store.windows[number]
        if norm_limits(self.store.manifest) is None:
            keep = WindowRows(self.model, group, self.config.rows).keep
        else:
            keep = self._computed(number, group, self.store.sites, find_kept=True).keep
        split = np.full(len(group.tokens), SPLITS.index(window.split), np.int8)
        return {"tokens": group.tokens, "document": group.document, "keep": keep, "split": split}

    def _rewrite_sequences(self, fault: Fault, groups: dict[int, Sequences]) -> None:
        store, array, chunk = self.store, str(fault.array), int(fault.chunk or 0)
        per_chunk, stored = int(store.manifest["sequences_per_window"]), []
        for number, window in enumerate(store.windows):
            for piece in window.pieces(per_chunk):
                if piece.chunk == chunk:
                    values = self._sequence_values(number, groups[number])[array]
                    stored.append(values[piece.offset : piece.offset + piece.sequences])
        whole = filled_up(array, np.concatenate(stored), per_chunk)
        write_chunk(store.sequence_chunk_path(array, chunk), whole, replaces=True)
        self.done.append(fault.path)

    def _rewrite_list(self, fault: Fault, group: Sequences) -> None:
        window = int(fault.chunk or 0)
        split = self.store.windows[window].split
        schema = document_schema(self.store.manifest)
        crc = write_documents(self.store.path, window, split, group.described, schema)
        expected = self.store.ledger.documents_crc(window)
        if expected is not None and crc != expected:
            # the text was just found to be the same; another pyarrow writes other bytes
            why = "the same text, written by another version of Parquet's library"
            self._correct({"list": window}, crc, why)
        self.done.append(fault.path)

    # row_token and sites: from the stored tokens and the model

    def _rows(self) -> None:
        faults = self._faults(*row_arrays(self.store.manifest))
        chunk_rows = int(self.store.manifest["chunk_rows"])
        for number, window in enumerate(self.store.windows):
            chunks = {chunk.index for chunk in window.chunks(chunk_rows)}
            here = [fault for fault in faults if fault.chunk in chunks]
            if here:
                self._window(number, window, here)

    def _group(self, number: int) -> Sequences:
        """What a window was computed from: its stored tokens, or what the corpus holds."""
        if self.config.model.reads_tokens:
            return group_of(self.store, number)
        return dict(self._groups({number}))[number]

    def _window(self, number: int, window: Window, faults: Sequence[Fault]) -> None:
        """Compute a window again and put back its damaged chunks."""
        store, arrays = self.store, row_arrays(self.store.manifest)
        damaged = {arrays[str(fault.array)].site for fault in faults}
        try:
            group = self._group(number)
            data = self._computed(number, group, [s for s in store.sites if s in damaged])
        except SaescopeError as error:
            self.left += [f"{fault.path}: needs what cannot be had: {error}" for fault in faults]
            return
        chunk_rows = int(store.manifest["chunk_rows"])

        def computed(array: str, chunk: int) -> NDArray[Any]:
            return dealt(data, window, array, chunk, chunk_rows)

        agreements = {array: self._compare(array, window, computed) for array in data.rows}
        for fault in faults:
            array, chunk = str(fault.array), int(fault.chunk or 0)
            self._put_back(fault, computed(array, chunk), agreements.get(array))

    def _computed(
        self, number: int, group: Sequences, sites: Sequence[str], *, find_kept: bool = False
    ) -> WindowData:
        total = group.tokens.size if sites else 0
        with Progress(f"window {number}", total, "tokens") as progress:
            return recompute(
                self.store,
                number,
                group,
                self.model,
                sites,
                self.config,
                progress,
                find_kept=find_kept,
            )

    def _compare(self, array: str, window: Window, computed: Any) -> Agreement:
        """Recomputed against stored, for the chunks of a window that are whole."""
        agreement = Agreement()
        for chunk in window.chunks(int(self.store.manifest["chunk_rows"])):
            try:
                stored = self.store.read_rows(array, chunk.index)
            except DamagedError:
                continue
            found = computed(array, chunk.index)
            agreement.add(stored[: chunk.rows], found[: chunk.rows])
        return agreement

    def _put_back(self, fault: Fault, values: NDArray[Any], agreement: Agreement | None) -> None:
        store, array, chunk = self.store, str(fault.array), int(fault.chunk or 0)
        crc, expected = crc32c(values), store.ledger.rows_crc(array, chunk)
        if expected is None and agreement is not None:
            same = agreement.chunks > 0 and agreement.differing == 0
        else:
            same = expected is None or crc == expected
        if not same and not (self.allow_rounding and agreement is not None):
            why = f"; {agreement}" if agreement else ""
            self.left.append(
                f"{fault.path}: computed again it is not what was committed{why}. This machine or "
                "its libraries may round otherwise; --allow-rounding puts it back all the same"
            )
            return
        ndim = values.ndim
        path = chunk_path(store.path / GROUP, array, chunk, ndim)
        write_chunk(path, values, replaces=True)
        if not same and expected is not None:
            self._correct({"array": array, "chunk": chunk}, crc, str(agreement))
        self.done.append(fault.path if same else f"{fault.path}, with other rounding: {agreement}")

    def _correct(self, which: dict[str, Any], crc: int, reason: str) -> None:
        why = {"reason": reason, "machine": platform.machine(), "versions": library_versions()}
        HarvestWriter(self.store).correct(correction_line(which, crc, why))


def rebuild_ledger(folder: AnyPath, manifest: Mapping[str, Any]) -> bytes:
    """The content of a store's damaged ledger, from its other files.

    It is right for certain, as its sha256 is in the manifest. Raises ArtefactError if that does not
    match, as when another file is damaged too.
    """
    where, committed = str(folder / LEDGER), manifest["ledger"]
    store = ActivationStore(
        folder, {**manifest, "schema": 1, "windows": _windows(folder, manifest)}
    )
    content = b""
    for number, window in enumerate(store.windows):
        if len(content) < committed["bytes"]:
            content += window_line(window, checksums(store, number))
    if hashlib.sha256(content).hexdigest() != committed["sha256"]:
        raise ArtefactError("cannot be rebuilt: what it would say is not what it said", where=where)
    return content


def _windows(folder: AnyPath, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The windows of a store by its arrays `split` and `keep`."""
    count = read_json(folder / GROUP / "tokens" / METADATA)["shape"][0]
    per_window, chunk_rows = manifest["sequences_per_window"], manifest["chunk_rows"]
    whole = {**manifest, "schema": 1, "windows": [vars(Window(SPLITS[0], 0, 0, 0, count))]}
    everything = ActivationStore(folder, whole)
    split, keep = (everything.read_sequences(name, 0) for name in ("split", "keep"))
    first_sequences = {segment["first_sequence"] for segment in manifest.get("appended", [])}
    changes = {*(np.flatnonzero(np.diff(split)) + 1).tolist(), *first_sequences, 0}
    borders = [*sorted(border for border in changes if border < count), count]
    found: list[dict[str, Any]] = []
    chunk = 0
    for start, end in itertools.pairwise(borders):
        for first in range(start, end, per_window):
            size = min(per_window, end - first)
            rows = int(keep[first : first + size].sum())
            found.append(vars(Window(SPLITS[split[first]], chunk, rows, first, size)))
            chunk += -(-rows // chunk_rows)
    return found
