"""The text of a corpus as a harvest reads it: split, without repetitions, packed and counted."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from activations.corpora.documents import CorpusConfig, Document, DocumentStream, TextHashes
from activations.corpora.sequences import (
    JOINED,
    Described,
    PackingCounts,
    PackingOptions,
    Sequences,
)
from activations.harvesting.config import HarvestConfig
from activations.harvesting.segments import Segment
from activations.models.base import HarvestModel
from activations.storage.layout import SPLITS
from saescope.errors import InputError
from saescope.progress import say


@dataclass(frozen=True, kw_only=True)
class CorpusReader:
    """A corpus, and how a harvest reads it."""

    corpus: CorpusConfig
    context: int
    held_out_fraction: float
    packing: str = JOINED
    first_document: int = 0
    """Number of its first document."""
    prepend_bos: bool | None = None
    """Whether sequences begin with BOS; None: where the tokenizer adds one."""

    @classmethod
    def of(cls, config: HarvestConfig, segment: Segment | None = None) -> "CorpusReader":
        """The text that a configuration asks for, or that of a segment of its harvest."""
        return cls(
            corpus=config.corpus if segment is None else segment.corpus,
            context=config.context,
            held_out_fraction=config.held_out_fraction,
            packing=config.packing,
            first_document=0 if segment is None else segment.first_document,
            prepend_bos=config.prepend_bos,
        )

    def packed(
        self,
        split: str,
        model: HarvestModel,
        *,
        per_group: int,
        counts: PackingCounts,
        limit: int | None,
        before: ArrayLike = (),
        cursor: Mapping[str, Any] | None = None,
        to_end: bool = False,
    ) -> Iterator[Sequences]:
        """The sequences of one split's documents, always the same ones; a language model's packed.

        Args: before has the numbers of documents of this split that were there before, which count
        where repetitions are left out. cursor is that of a group read earlier, to resume from;
        limit and to_end as for `pack`. cursor and to_end are for language models.

        Raises InputError as `DocumentStream` and `pack` do.
        """
        if limit == 0:
            return iter(())
        reader = cursor["reader"] if cursor else None
        stream = model.documents(
            self.corpus, first=self.first_document, state=reader["stream"] if reader else None
        )
        for name, value in reader["counts"].items() if reader else ():
            setattr(counts, name, value)

        def state() -> Any:
            if isinstance(stream, DocumentStream) and self.corpus.can_go_on:
                return {"stream": stream.state, "counts": counts.stored()}
            return None

        options = PackingOptions(
            kind=self.packing,
            prepend_bos=self.prepend_bos,
            describe=self._describe,
            state=state,
            cursor=cursor,
            to_end=to_end,
        )
        return model.sequences(
            self._chosen(stream, split, counts, before),
            context=self.context,
            per_group=per_group,
            counts=counts,
            limit=limit,
            packing=options,
        )

    def _chosen(
        self, stream: Iterable[Document], split: str, counts: PackingCounts, before: ArrayLike
    ) -> Iterator[Document]:
        """The documents of a split that are to be packed; the others of the split are counted."""
        held_out = split == SPLITS[1]
        seen = TextHashes(before) if self.corpus.deduplicate else None
        for document in stream:
            if document.is_held_out(self.held_out_fraction) != held_out:
                continue
            if document.is_empty:
                counts.empty_documents += 1
            elif seen is not None and not seen.add(document.number):
                counts.duplicate_documents += 1
            else:
                yield document

    def _describe(self, document: Document) -> Described:
        found = (document.id, document.key, document.title)
        return (*found, document.number) if self.corpus.deduplicate else found

    def planned_sequences(
        self,
        model: HarvestModel,
        max_tokens: int | None,
        before: Mapping[str, ArrayLike] | None = None,
    ) -> dict[str, int]:
        """How many sequences each split is to have (with max_tokens: at most).

        Without max_tokens the corpus is read through once to count, which costs about 1/200 of what
        running the model over it does, and finds a damaged record before hours of work.
        """
        if max_tokens is None:
            say("counting the tokens of the corpus")
            limits: dict[str, int | None] = dict.fromkeys(SPLITS)
        else:
            wanted = max_tokens // self.context
            held_out = round(wanted * self.held_out_fraction)
            limits = {"train": wanted - held_out, "held_out": held_out}
        planned = {}
        for split, limit in limits.items():
            # with a limit it is enough to know that there is text for one sequence
            read = min(limit, 1) if limit is not None else None
            found = self.packed(
                split,
                model,
                per_group=64,
                counts=PackingCounts(),
                limit=read,
                before=(before or {}).get(split, ()),
            )
            number = sum(len(group.tokens) for group in found)
            planned[split] = number if limit is None else limit * min(number, 1)
        if planned["train"] == 0:
            raise InputError(
                f"not enough text for one training sequence of {self.context} tokens",
                where=self.corpus.source,
            )
        if planned["held_out"] == 0 and self.held_out_fraction > 0:
            say(
                "the corpus is too small for a held-out sequence, so everything is for training; "
                "`saescope train` measures on held-out text and will refuse this harvest: give "
                "more documents, or a larger held_out_fraction"
            )
        return planned

    def counted(self, counts: PackingCounts) -> dict[str, Any]:
        """What the manifest says of a split that was read to its end."""
        found = counts.stored()
        chain, sources = found.pop("chain"), found.pop("sources")
        # a digest cannot be resumed from a cursor, and a chain is not what older harvests have
        found |= {"chain": chain} if self.corpus.can_go_on else {"hash": counts.digest.hexdigest()}
        if self.corpus.mix:
            pairs = zip(self.corpus.mix, [*sources, *[(0, 0)] * len(self.corpus.mix)], strict=False)
            found["sources"] = [
                {"source": member.source, "documents": documents, "bytes": size}
                for member, (documents, size) in pairs
            ]
        return found

    def agrees(self, counts: PackingCounts, recorded: Mapping[str, Any]) -> bool:
        """Whether a split read again is what a manifest, of an older schema even, says it was."""
        found = {**self.counted(counts), "hash": counts.digest.hexdigest()}
        return all(found.get(name) == value for name, value in recorded.items())
