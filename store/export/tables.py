"""CSV and Parquet: one file a table, whose columns are named as in the store.

In CSV a list is JSON.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from store.annotations import Annotations
from store.export.record import FeatureRecord, read_records
from store.feature_store import FeatureStore
from store.results import FeatureFilter

FORMATS = ("csv", "parquet")
_BATCH = 256
_F32, _I64, _TEXT = pa.float32(), pa.int64(), pa.string()
SCHEMAS = {
    "examples": pa.schema(
        {
            "feature": pa.int32(),
            "kind": _TEXT,
            "interval": pa.int8(),
            "rank": pa.int16(),
            "activation": _F32,
            "position": _I64,
            "sequence": _I64,
            "index": pa.int32(),
            "document": _I64,
            "title": _TEXT,
            "tokens": pa.list_(_TEXT),
            "activations": pa.list_(_F32),
        }
    ),
    "histogram": pa.schema(
        {"feature": pa.int32(), "low": pa.float64(), "high": pa.float64(), "count": _I64}
    ),
    "logits": pa.schema(
        {
            "feature": pa.int32(),
            "sign": pa.int8(),
            "rank": pa.int16(),
            "token_id": pa.int32(),
            "token": _TEXT,
            "value": _F32,
        }
    ),
    "enrichment": pa.schema(
        {
            "feature": pa.int32(),
            "rank": pa.int16(),
            "kind": _TEXT,
            "name": _TEXT,
            "documents": _I64,
            "expected": pa.float64(),
            "log_odds": pa.float64(),
            "q": pa.float64(),
            "positions": _I64,
            "share": pa.float64(),
            "expected_share": pa.float64(),
        }
    ),
    "layers": pa.schema(
        {
            "feature": pa.int32(),
            "layer": pa.int16(),
            "site": _TEXT,
            "count": _I64,
            "amount": pa.float64(),
            "share": pa.float64(),
        }
    ),
    "heads": pa.schema({"feature": pa.int32(), "head": pa.int16(), "norm": _F32, "share": _F32}),
    "neighbours": pa.schema(
        {"feature": pa.int32(), "rank": pa.int16(), "other": pa.int32(), "cosine": _F32}
    ),
    "coactivation": pa.schema(
        {
            "feature": pa.int32(),
            "rank": pa.int16(),
            "other": pa.int32(),
            "together": _I64,
            "share": _F32,
            "pmi": _F32,
            "correlation": _F32,
        }
    ),
}
"""columns of the tables that are written feature by feature; `features` has those of the store"""
Rows = list[tuple[Any, ...]]


def write_tables(
    folder: Path, kind: str, store: FeatureStore, notes: Annotations, features: Sequence[int]
) -> Iterator[int]:
    """Write the tables into a folder; yields how many more features are written.

    kind: "csv" or "parquet".
    """
    with ExitStack() as stack:
        writers = {name: _Writer(folder, name, kind, schema) for name, schema in SCHEMAS.items()}
        for writer in writers.values():
            stack.callback(writer.close)
        statistics: _Writer | None = None
        for first in range(0, len(features), _BATCH):
            chosen = features[first : first + _BATCH]
            table = _statistics(store, notes, chosen)
            if statistics is None:
                statistics = _Writer(folder, "features", kind, table.schema)
                stack.callback(statistics.close)
            statistics.write(table)
            records = list(read_records(store, notes, chosen))
            for name, writer in writers.items():
                rows = [row for record in records for row in rows_of(name, record)]
                columns = list(zip(*rows, strict=True)) or [()] * len(writer.schema)
                arrays = [pa.array(c, f.type) for c, f in zip(columns, writer.schema, strict=True)]
                writer.write(pa.table(arrays, schema=writer.schema))
            yield len(chosen)


def _statistics(store: FeatureStore, notes: Annotations, features: Sequence[int]) -> pa.Table:
    rows = store.features(FeatureFilter(ids=tuple(features)), limit=max(len(features), 1)).rows
    numbers = rows.column("feature").to_pylist()
    labels, tokens = notes.labels(numbers), store.top_tokens(numbers)
    texts = [each.note for each in notes.get_several(numbers).values()]
    rows = rows.append_column("label", pa.array([labels.get(n, "") for n in numbers], _TEXT))
    rows = rows.append_column("note", pa.array(texts, _TEXT))
    return rows.append_column("top_tokens", pa.array([tokens[n] for n in numbers], pa.list_(_TEXT)))


def rows_of(table: str, record: FeatureRecord) -> Rows:
    """A feature's rows of one of the tables of SCHEMAS."""
    number = record.feature.feature
    if table == "examples":
        found = [*record.top, *(e for interval in record.intervals for e in interval.examples)]
        return [
            (
                number,
                e.kind,
                e.interval,
                e.rank,
                e.activation,
                e.position,
                e.sequence,
                e.index,
                e.document,
                e.title,
                e.tokens,
                e.activations,
            )
            for e in found
        ]
    if table == "histogram":
        edges, counts = record.histogram.edges.tolist(), record.histogram.counts.tolist()
        bins = zip(edges[:-1], edges[1:], counts, strict=True)
        return [(number, *each) for each in bins if each[-1]]
    if table == "logits":
        sides = ((1, record.logits.top), (-1, record.logits.bottom))
        return [
            (number, sign, rank, effect.token_id, effect.token, effect.value)
            for sign, effects in sides
            for rank, effect in enumerate(effects)
        ]
    if table == "enrichment":
        names = SCHEMAS[table].names[2:]
        found = enumerate(record.enrichments)
        return [(number, rank, *(getattr(e, name) for name in names)) for rank, e in found]
    if table == "layers":
        return [(number, e.layer, la.site, e.count, e.amount, e.share) for la, e in record.layers]
    if table == "heads":
        return [(number, e.head, e.norm, e.share) for e in record.heads]
    if table == "neighbours":
        return [(number, rank, n.feature, n.cosine) for rank, n in enumerate(record.neighbours)]
    return [
        (number, rank, c.feature, c.together, c.share, c.pmi, c.correlation)
        for rank, c in enumerate(record.coactivating)
    ]


class _Writer:
    """A table's file, written in pieces."""

    def __init__(self, folder: Path, name: str, kind: str, schema: pa.Schema) -> None:
        self.schema = schema
        path = folder / f"{name}.{kind}"
        self._lists = [pa.types.is_list(field.type) for field in schema]
        self._parquet = self._stream = None
        if kind == "parquet":
            self._parquet = pq.ParquetWriter(path, schema, compression="zstd")
        else:
            self._stream = path.open("w", encoding="utf-8", newline="")
            self._csv = csv.writer(self._stream, lineterminator="\n")
            self._csv.writerow(schema.names)

    def write(self, table: pa.Table) -> None:
        if self._parquet is not None:
            self._parquet.write_table(table)
            return
        for row in table.to_pylist():
            self._csv.writerow(
                json.dumps(value, ensure_ascii=False) if is_list else value
                for value, is_list in zip(row.values(), self._lists, strict=True)
            )

    def close(self) -> None:
        for each in (self._parquet, self._stream):
            if each is not None:
                each.close()
