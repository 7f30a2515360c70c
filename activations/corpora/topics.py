"""Where documents come from, and what they are about, by their keys, after they were harvested.

A document's key is its title in a packaged corpus, file#record or file:line in files, and
hf:NAME#record in a data set of the hub (see `activations.corpora.sources`).
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from activations.corpora.sources import (
    HUB_PREFIX,
    PACKAGED_CORPORA,
    SourceConfig,
    open_data_set,
)
from activations.corpora.tables import columns_of
from saescope.errors import InputError, SaescopeError
from saescope.progress import say

_IN_FILE = re.compile(r"(.*\.(?:jsonl|parquet|arrow))[:#](\d+)", re.DOTALL)
_FILE_OF_ITS_OWN = re.compile(r"(.*)[\\/][^\\/]+\.(?:txt|png|jpe?g|webp|bmp)(?:#\d+)?", re.DOTALL)
_LONGEST = 200


def document_sources(corpus: Mapping[str, Any], keys: Sequence[str]) -> list[str | None]:
    """The source of each document: its file, the folder of files that are documents themselves, a
    data set of the hub or a packaged corpus; None where the key does not say.

    Args: corpus is what a harvest's manifest says of it. Paths are given without the folders that
    all have in common.

    >>> document_sources({"source": "texts/*.jsonl"}, ["texts/a.jsonl:1", "texts/b.jsonl:7"])
    ['a.jsonl', 'b.jsonl']
    """
    packaged = _packaged(corpus)
    found: list[str | None] = []
    paths: set[str] = set()
    for key in keys:
        match = _IN_FILE.fullmatch(key) or _FILE_OF_ITS_OWN.fullmatch(key)
        if key.startswith(HUB_PREFIX):
            found.append(key.rpartition("#")[0] or key)
        elif match:
            found.append(match[1])
            paths.add(match[1])
        else:
            found.append(packaged)
    if len(paths) < 2:
        return found
    common = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    return [os.path.relpath(each, common or ".") if each in paths else each for each in found]


def document_topics(
    corpus: Mapping[str, Any], keys: Sequence[str], field: str = "topic"
) -> list[str | None]:
    """What each document's record says in a field of texts; None where it says nothing.

    Reads the files again, and streams data sets of the hub again as far as they were read; says
    which are gone.
    """
    wanted: dict[str, dict[int, list[int]]] = {}
    streamed: dict[str, dict[int, list[int]]] = {}
    topics: list[str | None] = [None] * len(keys)
    articles = _articles(_packaged(corpus))
    for index, key in enumerate(keys):
        source, _, number = key.rpartition("#")
        match = None if key.startswith(HUB_PREFIX) else _IN_FILE.fullmatch(key)
        if key.startswith(HUB_PREFIX) and number.isdecimal():
            streamed.setdefault(source, {}).setdefault(int(number), []).append(index)
        elif match:
            wanted.setdefault(match[1], {}).setdefault(int(match[2]), []).append(index)
        elif key in articles:
            topics[index] = _topic(articles[key], field)
    unread = []
    for name, numbers in wanted.items():
        path = Path(name)
        try:
            for number, record in _records(path, field):
                for index in numbers.get(number, ()):
                    topics[index] = _topic(record, field)
        except (OSError, ValueError) as error:
            unread.append(f"{name}: {error}")
    if unread:
        say(f"topics: {len(unread)} files cannot be read again, such as {unread[0]}")
    for config in _streamed_members(corpus):
        for number, topic in _hub_topics(config, streamed.get(config.source, {}), field):
            for index in streamed[config.source][number]:
                topics[index] = topic
    return topics


def _members(corpus: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sources of a corpus: those of a mix, or itself."""
    members: Iterable[Any] = corpus.get("mix") or [corpus]
    return [member for member in members if isinstance(member, Mapping)]


def _streamed_members(corpus: Mapping[str, Any]) -> list[SourceConfig]:
    """The data sets of the hub in a corpus."""
    found = []
    for member in _members(corpus):
        source, split = member.get("source"), member.get("hf_split", SourceConfig.hf_split)
        if isinstance(source, str) and source.startswith(HUB_PREFIX) and isinstance(split, str):
            found.append(SourceConfig(source=source, hf_split=split))
    return found


def _hub_topics(
    config: SourceConfig, wanted: Mapping[int, Any], field: str
) -> Iterator[tuple[int, str | None]]:
    """Numbers and topics of the wanted records of a data set, if its records have the field."""
    if not wanted:
        return
    try:
        rows = open_data_set(config)
        if rows.column_names is not None and field not in rows.column_names:
            return
        for number, record in enumerate(islice(rows, max(wanted) + 1)):
            if field not in record:
                return
            if number in wanted:
                yield number, _topic(record, field)
    except Exception as error:  # the loader, the network and the hub raise almost anything
        say(f"topics: {config.source} cannot be streamed again: {error}")


def _packaged(corpus: Mapping[str, Any]) -> str | None:
    """The packaged corpus among the sources, whose documents' keys are titles."""
    names = [member.get("source") for member in _members(corpus)]
    return next((name for name in names if name in PACKAGED_CORPORA), None)


def _articles(name: str | None) -> Mapping[str, Any]:
    if name is None:
        return {}
    from saescope.assets import read_member

    try:
        return json.loads(read_member(name, PACKAGED_CORPORA[name]))
    except SaescopeError as error:
        say(f"topics: left out, as the corpus {name} is not here: {error}")
        return {}


def _topic(record: Any, field: str) -> str | None:
    value = record.get(field) if isinstance(record, Mapping) else None
    return value.strip()[:_LONGEST] or None if isinstance(value, str) else None


def _records(path: Path, field: str) -> Iterable[tuple[int, Any]]:
    """The records of a file with their numbers, as keys have them."""
    if path.suffix == ".jsonl":
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if field.encode() in line:
                    yield number, json.loads(line)
        return
    number = 0
    try:
        for batch in columns_of(path, lambda names: [name for name in names if name == field]):
            for record in batch.to_pylist():
                yield number, record
                number += 1
    except InputError as error:
        raise OSError(str(error)) from error
