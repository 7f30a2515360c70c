"""Corpora: the documents of one source of texts, or of several mixed by weight, in order."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from activations.corpora.sources import PACKAGED_CORPORA, Messages, Source, SourceConfig
from saescope.errors import InputError, check_range

__all__ = ["MIX", "PACKAGED_CORPORA", "CorpusConfig", "Document", "DocumentStream", "documents"]

Spell = Callable[[NDArray[np.int64]], tuple[NDArray[np.int32], str]]
"""Token ids of a document to those that are packed, and their text."""
MIX = "mix"
"""The source that stands for several."""


@dataclass(frozen=True, kw_only=True)
class MixedConfig(SourceConfig):
    """One source of a mixed corpus."""

    weight: float = 1.0
    """Its share of the text, in bytes of UTF-8, over the sum of the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("corpus.mix.weight", self.weight, above=0, below=float("inf"))
        if self.source == MIX:
            raise InputError("a mix of mixes", where="corpus.mix.source", given=self.source)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(SourceConfig):
    """The texts: of one source, or (source = "mix") of several."""

    mix: tuple[MixedConfig, ...] = ()
    """The sources of a mixed corpus: tables [[corpus.mix]] with source, weight and the fields of a
    source, instead of those here."""

    mix_ends: Literal["first", "last"] = "first"
    """Where a mixed corpus ends: with the first source that has no more documents, so that the
    shares hold to the end, or with the last."""

    deduplicate: bool = False
    """Leave out every document whose text was there before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix_ends not in ("first", "last"):
            raise InputError(
                "no such end", where="corpus.mix_ends", given=self.mix_ends, allowed="first, last"
            )
        if (self.source == MIX) != bool(self.mix):
            raise InputError(
                'a mixed corpus has source = "mix" and tables [[corpus.mix]]',
                where="corpus.source",
                given=self.source,
                allowed=MIX if self.mix else "any but mix",
            )
        own = [f for f in fields(SourceConfig) if f.name != "source"]
        given = [f.name for f in own if getattr(self, f.name) != f.default]
        if self.mix and given:
            raise InputError(
                "belongs to each source of a mix: set it in [[corpus.mix]]",
                where=f"corpus.{given[0]}",
                given=getattr(self, given[0]),
            )

    @property
    def members(self) -> tuple[SourceConfig, ...]:
        """Its sources."""
        return self.mix or (self,)

    @property
    def can_go_on(self) -> bool:
        """Whether reading can resume from a saved cursor instead of starting again."""
        return any(member.is_streamed for member in self.members)


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    id: int
    """Its running number in the corpus, over both splits; -1 if it is empty."""
    key: str
    """Where it comes from: a title, file#record, or the record's number."""
    text: str
    title: str
    member: int = 0
    """Which source of a mixed corpus it is of."""
    replaced: bool = False
    """Whether something in it, or in its title, that is no text was replaced."""
    tokens: NDArray[np.int32] | None = field(default=None, compare=False)
    """Its token ids, where the corpus has these; `text` is then what they spell."""

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing but white space."""
        return self.id < 0

    @property
    def number(self) -> int:
        """A 64-bit hash of its text."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return int.from_bytes(digest[:8], "big")

    def is_held_out(self, fraction: float) -> bool:
        """Whether it belongs to the held-out split: decided by its text alone.

        So equal texts are always on the same side, whatever the order or size of the corpus.
        """
        return self.number < fraction * 2**64


class DocumentStream:
    """Every document of a corpus in a fixed order, empty ones too; `state` is where it stands.

    The next document of a mixed corpus comes from the source that is furthest behind its share of
    the bytes so far, so that order and shares follow from the weights alone.

    Args: render makes the text of a conversation; spell checks token ids and gives their text;
    first is the number of the first document; state is that of an earlier stream of the same
    corpus, to go on from.

    Raises InputError if a source does not exist, a record lacks the field or is damaged, or there
    is no text at all.
    """

    def __init__(
        self,
        config: CorpusConfig,
        *,
        render: Callable[[Messages], str] | None = None,
        spell: Spell | None = None,
        first: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._config, self._render, self._spell = config, render, spell
        known: list[Any] = [None] * len(config.members) if state is None else state["sources"]
        self._sources = [Source(m, at) for m, at in zip(config.members, known, strict=True)]
        self._weights = [m.weight if isinstance(m, MixedConfig) else 1.0 for m in config.members]
        self._bytes = [0] * len(known) if state is None else list(state["bytes"])
        self._ended = set() if state is None else set(state["ended"])
        self._first = first
        self._next = first if state is None else int(state["next"])

    @property
    def state(self) -> dict[str, Any]:
        """A cursor behind the last document given, JSON-able."""
        return {
            "next": self._next,
            "bytes": list(self._bytes),
            "ended": sorted(self._ended),
            "sources": [source.state for source in self._sources],
        }

    def __iter__(self) -> Iterator[Document]:
        while (member := self._furthest_behind()) is not None:
            record = next(self._sources[member], None)
            if record is None:
                self._ended.add(member)
                continue
            content, tokens = record.content, None
            if isinstance(content, np.ndarray):
                tokens, content = self._spelled(content, record.key)
            text = content if isinstance(content, str) else self._rendered(content, record.key)
            sound, key, title = whole(text), whole(record.key), whole(record.title)
            self._bytes[member] += len(sound.encode())
            number = self._next if (sound.strip() if tokens is None else len(tokens)) else -1
            self._next += number >= 0
            replaced = (sound, key, title) != (text, record.key, record.title)
            yield Document(number, key, sound, title, member, replaced, tokens)
        if self._next == self._first:
            raise InputError("this corpus has no text", where=self._config.source)

    def _furthest_behind(self) -> int | None:
        """The source whose turn it is; None at the end."""
        if self._ended and self._config.mix_ends == "first":
            return None
        going = [n for n in range(len(self._sources)) if n not in self._ended]
        return min(going, key=lambda n: (self._bytes[n] / self._weights[n], n), default=None)

    def _rendered(self, messages: Messages, where: str) -> str:
        if self._render is None:
            raise InputError("a conversation needs a model's chat template", where=where)
        try:
            return self._render(messages)
        except InputError as error:
            raise InputError(str(error), where=where) from error

    def _spelled(self, ids: NDArray[np.int64], where: str) -> tuple[NDArray[np.int32], str]:
        if self._spell is None:
            raise InputError("token ids need a language model's tokenizer", where=where)
        try:
            return self._spell(ids)
        except InputError as error:
            raise InputError(str(error), where=where) from error


def whole(text: str) -> str:
    """A text with a question mark for each half of a surrogate pair, which no file or tokenizer
    takes: JSON can carry one, and so can the name of a file."""
    return text.encode("utf-8", "replace").decode()


def documents(
    config: CorpusConfig, *, render: Callable[[Messages], str] | None = None
) -> Iterator[Document]:
    """Every document of a corpus that has text, in a fixed order, streamed.

    Raises InputError as `DocumentStream` does.

    >>> config = CorpusConfig(source="texts/*.jsonl")
    >>> [document.title for document in documents(config)]  # doctest: +SKIP
    ['A first title', 'A second title']
    """
    stream = DocumentStream(config, render=render)
    return (document for document in stream if not document.is_empty)


_MOST_LOOSE = 1 << 16


class TextHashes:
    """A set of 64-bit hashes of texts, in about 20 bytes each.

    The chance of a collision among 10^8 texts is 3e-4.
    """

    def __init__(self, numbers: ArrayLike = ()) -> None:
        self._sorted: NDArray[np.uint64] = np.sort(np.asarray(numbers, np.uint64))
        self._loose: set[int] = set()

    def add(self, number: int) -> bool:
        """Add a hash; returns whether it is new."""
        index = int(np.searchsorted(self._sorted, np.uint64(number)))
        known = index < len(self._sorted) and int(self._sorted[index]) == number
        if known or number in self._loose:
            return False
        self._loose.add(number)
        if len(self._loose) > max(_MOST_LOOSE, len(self._sorted) // 4):
            loose = np.fromiter(self._loose, np.uint64, len(self._loose))
            self._sorted = np.sort(np.concatenate([self._sorted, loose]))
            self._loose = set()
        return True
