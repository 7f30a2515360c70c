"""Protocols of evaluations: what each says, and whether figures may be compared."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dashboards.reports.measured import Evaluation
from saescope.pieces import Section, Table

_MOST_KEYS, _LONGEST = 30, 90


def protocol_warnings(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """Why figures of these may not be compared; nothing if they were measured alike."""
    groups: dict[str, list[str]] = {}
    for each in evaluations:
        groups.setdefault(each.protocol_hash, []).append(each.name)
    if len(groups) < 2:
        return ()
    listed = "; ".join(
        f"{protocol[:12] or 'unknown'}: {', '.join(names)}" for protocol, names in groups.items()
    )
    return (
        f"Not comparable: these were measured under {len(groups)} protocols ({listed}). Figures "
        "may be compared within one of them only; the section Protocol says how they differ.",
    )


def protocols(evaluations: Sequence[Evaluation]) -> Section:
    """How it was measured; of several protocols, what differs between them."""
    by_hash = {
        each.protocol_hash: dict(_flat(each.found.get("protocol") or {})) for each in evaluations
    }
    keys = list(dict.fromkeys(key for protocol in by_hash.values() for key in protocol))
    differing = [key for key in keys if len({_text(p.get(key)) for p in by_hash.values()}) > 1]
    tables = []
    if differing:
        tables.append(_table("What differs", differing, by_hash))
    common = [key for key in keys if key not in differing]
    if common:
        first = dict(list(by_hash.items())[:1])
        name = "the same in all" if len(by_hash) > 1 else next(iter(first))[:12]
        tables.append(_table("", common, {name: next(iter(first.values()))}))
    return Section(
        title="Protocol",
        words=(
            "What decides the numbers besides the SAE. Its sha256, which tells which figures may "
            f"be compared: {', '.join(hash_ or 'unknown' for hash_ in by_hash)}.",
        ),
        tables=(*tables,),
    )


def _table(title: str, keys: Sequence[str], by_hash: Mapping[str, Mapping[str, Any]]) -> Table:
    more = (
        f"{len(keys) - _MOST_KEYS:,} more are in evaluation.json." if len(keys) > _MOST_KEYS else ""
    )
    return Table(
        title=title,
        about=more,
        columns=("setting", *(name[:20] if len(name) < 64 else name[:12] for name in by_hash)),
        rows=tuple(
            (key, *(_text(protocol.get(key)) for protocol in by_hash.values()))
            for key in keys[:_MOST_KEYS]
        ),
    )


def _flat(protocol: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables by dotted names."""
    for key, value in protocol.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _text(value: Any) -> str:
    if value is None:
        return "–"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
