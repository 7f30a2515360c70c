"""The last steps of building a store: check the rows, sort them both ways, fill all tables."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from saescope.errors import InputError
from saescope.memory import cycles_later
from saescope.progress import Progress
from store import summaries
from store.database import identifier
from store.enrichment import GroupCounts
from store.profiles import Kept, ProfileRows
from store.statement_progress import watched
from store.summaries import Scratch

_ORDERS = {
    "vocabulary": "token_id",
    "sequence": "sequence",
    "document": "document",
    "logit": "feature, sign DESC, rank",
    "neighbour": "feature, rank",
    "histogram": "feature, bin",
    "example": "feature, kind DESC, interval DESC, rank",
    "coactivation": "feature, rank",
    "token_profile": "feature, rank",
    "position_bin": "bin",
    "position_profile": "feature, bin",
    "picture": "document",
    "logit_histogram": "feature",
    "document_group": "document, kind",
    "enrichment": "feature, rank",
    "layer": "layer",
    "layer_profile": "feature, layer",
    "head_norm": "feature, head",
    "map_point": "feature",
    "measured_logit": "feature, sign DESC, rank",
}
_EXAMPLE_TYPES: dict[str, pa.DataType] = {
    "feature": pa.int32(),
    "kind": pa.string(),
    "interval": pa.int8(),
    "rank": pa.int16(),
    "position": pa.int64(),
    "activation": pa.float32(),
    "token_id": pa.int32(),
    "active_place": pa.list_(pa.int32()),
    "active_value": pa.list_(pa.float32()),
}
_SEED = 20260
_FLUSH_EXAMPLES = 50_000


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """Input of `build_tables`; `con` is a connection with `staging` and `db` attached."""

    con: Any
    scratch: Path
    d_sae: int
    context: int
    n_activations: int
    n_vocabulary: int
    columns: Mapping[str, pa.ChunkedArray]
    meta: Mapping[str, str]

    def one(self, sql: str) -> Any:
        """The first row of a query."""
        return self.con.execute(sql).fetchone()

    def insert(self, table: str, rows: pa.Table) -> None:
        """Append rows to a table of `staging`."""
        self.con.register("rows", rows)
        names = ", ".join(map(identifier, rows.column_names))
        self.con.execute(f"INSERT INTO staging.{table} ({names}) SELECT {names} FROM rows")
        self.con.unregister("rows")

    def batches(self, sql: str, rows: int = 1 << 20) -> Iterator[dict[str, np.ndarray]]:
        """A query's columns as NumPy arrays, in pieces; columns of lists are joined end to end."""
        for batch in self.con.sql(sql).to_arrow_reader(rows):
            columns = zip(batch.schema.names, batch.columns, strict=True)
            yield {
                name: (column.flatten() if pa.types.is_list(column.type) else column).to_numpy(
                    zero_copy_only=False
                )
                for name, column in columns
            }


def build_tables(job: BuildJob, progress: Progress) -> dict[str, int]:
    """Fill `db` from `staging`; returns the number of rows of each table.

    Raises InputError if the rows in `staging` do not fit together.
    """
    counts = _check_sequences(job)
    sort_rows = "INSERT INTO db.{} BY NAME SELECT * FROM staging.activation_by_position ORDER BY {}"
    by_feature = "feature, activation DESC, position"
    with watched(job.con, progress, job.n_activations, "sorting by feature"):
        job.con.execute(sort_rows.format("activation_by_feature", by_feature))
    with watched(job.con, progress, job.n_activations, "sorting by position"):
        job.con.execute(sort_rows.format("activation_by_position", "position, feature"))
    job.con.execute("DROP TABLE staging.activation_by_position; CHECKPOINT staging")
    repeated = job.one(
        "SELECT position, feature FROM (SELECT position, feature, position = lag(position) OVER ()"
        " AND feature = lag(feature) OVER () AS again FROM db.activation_by_position)"
        " WHERE again LIMIT 1"
    )
    if repeated:
        raise InputError(
            "an activation was given twice", given=f"position {repeated[0]}, feature {repeated[1]}"
        )
    table = _feature_statistics(job, counts["n_kept"])
    scratch = _load_scratch(job, counts)
    with cycles_later():
        table |= _summarise(job, scratch, table, counts, progress)
    for name, order in _ORDERS.items():
        job.con.execute(f"INSERT INTO db.{name} SELECT * FROM staging.{name} ORDER BY {order}")
    _write_features(job, table)
    _write_meta(job, counts, table)
    tables = [*_ORDERS, "activation_by_feature", "activation_by_position", "feature"]
    rows = {name: int(job.one(f"SELECT count(*) FROM db.{name}")[0]) for name in tables}
    job.con.execute("CHECKPOINT db; DETACH db")
    return rows


def _check_sequences(job: BuildJob) -> dict[str, int]:
    n, distinct, last = job.one(
        "SELECT count(*), count(DISTINCT sequence), max(sequence) FROM staging.sequence"
    )
    if not n:
        raise InputError("no sequences were given", where="sequences")
    if distinct < n:
        raise InputError("a sequence was given twice", where="sequences")
    low, high = job.one("SELECT min(list_min(tokens)), max(list_max(tokens)) FROM staging.sequence")
    if low < 0 or high >= job.n_vocabulary:
        wrong = low if low < 0 else high
        raise InputError(
            "a token has no text in the vocabulary",
            where="tokens",
            given=wrong,
            allowed=f"0 to {job.n_vocabulary - 1}",
        )
    effects = job.one("SELECT min(token_id), max(token_id) FROM staging.logit")
    if effects[0] is not None and (effects[0] < 0 or effects[1] >= job.n_vocabulary):
        raise InputError("a token has no text in the vocabulary", where="logits", given=effects)
    documents, distinct_documents = job.one(
        "SELECT count(*), count(DISTINCT document) FROM staging.document"
    )
    if distinct_documents < documents:
        raise InputError("a document was given twice", where="documents")
    kept, held_out = job.one(
        "SELECT sum(k), coalesce(sum(k) FILTER (split = 1), 0) FROM"
        " (SELECT split, len(list_filter(keep, lambda x: x)) AS k FROM staging.sequence)"
    )
    last_document = job.one("SELECT max(list_max(document)) FROM staging.sequence")[0]
    return {
        "n_sequences": n,
        "n_kept": int(kept),
        "n_held_out": int(held_out),
        "n_documents": documents,
        "last_sequence": last,
        "last_document": max(last_document, -1),
    }


def _feature_statistics(job: BuildJob, kept: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = job.con.execute(
        "SELECT feature, min(rowid) AS first_row, count(*) AS n_active, max(activation) AS max"
        " FROM db.activation_by_feature GROUP BY feature ORDER BY feature"
    ).fetchnumpy()
    live = np.asarray(found["feature"])
    table: dict[str, np.ndarray] = {"feature": np.arange(job.d_sae, dtype=np.int32)}
    for name, dtype in {"n_active": "int64", "max": "float32"}.items():
        table[name] = np.zeros(job.d_sae, dtype=dtype)
        table[name][live] = found[name]
    table["first_row"] = np.cumsum(table["n_active"]) - table["n_active"]
    if not np.array_equal(table["first_row"][live], found["first_row"]):
        raise RuntimeError("DuckDB did not keep the order of the sorted rows")
    table["density"] = table["n_active"] / max(kept, 1)
    return table


def _load_scratch(job: BuildJob, counts: Mapping[str, int]) -> Scratch:
    positions = (counts["last_sequence"] + 1) * job.context
    scratch = Scratch.create(job.scratch, n=job.n_activations, positions=positions)
    columns = "sequence, tokens, document, keep"
    for batch in job.batches(f"SELECT {columns} FROM staging.sequence", rows=1 << 13):
        at = batch["sequence"]
        document = np.where(batch["keep"], np.maximum(batch["document"], -1), summaries.NOT_KEPT)
        scratch.token.reshape(-1, job.context)[at] = batch["tokens"].reshape(-1, job.context)
        scratch.document.reshape(-1, job.context)[at] = document.reshape(-1, job.context)
    done = 0
    for batch in job.batches("SELECT position, activation FROM db.activation_by_feature"):
        size = len(batch["position"])
        scratch.position[done : done + size] = batch["position"]
        scratch.activation[done : done + size] = batch["activation"]
        done += size
    done = 0
    for batch in job.batches("SELECT position, feature FROM db.activation_by_position"):
        size = len(batch["position"])
        last = int(batch["position"][-1])
        if last >= positions:
            raise InputError(
                "an activation lies in no sequence",
                where="position",
                given=last,
                allowed=f"0 to {positions - 1}",
            )
        scratch.other[done : done + size] = batch["feature"]
        first = int(batch["position"][0])
        counted = np.bincount(batch["position"] - first)
        scratch.start[first + 1 : last + 2] += counted
        done += size
    np.cumsum(scratch.start, out=scratch.start)
    return scratch


def _summarise(
    job: BuildJob,
    scratch: Scratch,
    table: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Fill all tables of single features; each feature's mean, std and n_documents.

    Sums are made here, in the order of the rows: DuckDB's threads add up in any order.
    """
    seen = np.zeros(counts["last_document"] + 3, dtype=bool)
    marked = np.full(counts["last_sequence"] + 1, -1, dtype=np.int32)
    n_active = table["n_active"]
    documents = np.zeros(job.d_sae, dtype=np.int64)
    means, deviations = np.zeros(job.d_sae), np.zeros(job.d_sae)
    histograms: list[tuple[int, np.ndarray]] = []
    pairs: list[tuple[int, summaries.Coactive]] = []
    examples = _ExampleRows(job.context, scratch)
    kept = scratch.document != summaries.NOT_KEPT
    profiles = ProfileRows(
        Kept.count(scratch.token, kept, n_tokens=job.n_vocabulary, context=job.context)
    )
    groups = GroupCounts(_document_groups(job), scratch.document, np.flatnonzero(n_active))
    for feature in np.flatnonzero(n_active):
        feature = int(feature)
        rows = slice(table["first_row"][feature], table["first_row"][feature] + n_active[feature])
        position, activation = scratch.position[rows], scratch.activation[rows]
        documents[feature] = summaries.count_documents(position, scratch.document, seen)
        if documents[feature] < 0:
            raise InputError(
                "an activation lies at a position that is not kept", where=f"feature {feature}"
            )
        groups.add(feature, position, np.flatnonzero(seen[2:]))
        means[feature], deviations[feature] = summaries.moments(activation)
        bins = summaries.histogram(activation)
        histograms.append((feature, bins))
        random = np.random.default_rng([_SEED, feature])
        examples.add(feature, position, activation, bins, marked, random)
        profiles.add(feature, position, scratch.token[position], activation)
        together = summaries.count_together(position, scratch, job.d_sae)
        found = summaries.coactive(feature, together, n_active, counts["n_kept"])
        pairs.append((feature, found))
        if len(examples) >= _FLUSH_EXAMPLES:
            job.insert("example", examples.pop_all())
        progress.advance(len(position), "summarising features")
    job.insert("example", examples.pop_all())
    _insert_histograms(job, histograms)
    _insert_pairs(job, pairs)
    for name, rows in {**profiles.tables(), **groups.tables()}.items():
        job.insert(name, rows)
    return {"mean": means, "std": deviations, "n_documents": documents}


def _document_groups(job: BuildJob) -> dict[str, dict[int, str]]:
    """The name of each document's group, by kind."""
    found: dict[str, dict[int, str]] = {}
    rows = job.con.execute("SELECT kind, document, name FROM staging.document_group").fetchall()
    for kind, document, name in rows:
        found.setdefault(kind, {})[document] = name
    return found


class _ExampleRows:
    """Chooses examples, and collects them as rows of the example table."""

    def __init__(self, context: int, scratch: Scratch) -> None:
        self._context = context
        self._scratch = scratch
        self._rows: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        feature: int,
        position: np.ndarray,
        activation: np.ndarray,
        bins: np.ndarray,
        marked: np.ndarray,
        random: np.random.Generator,
    ) -> None:
        """Choose a feature's examples; its rows [n] are sorted by activation, strongest first.

        bins: its histogram. marked: work space, see `summaries.windows`.
        """
        top = summaries.top_rows(position, self._context)
        chosen = [("top", -1, rank, row) for rank, row in enumerate(top)]
        for interval, rows in summaries.interval_rows(position, bins, self._context, random):
            chosen += [("interval", interval, rank, row) for rank, row in enumerate(rows)]
        rows = np.array([row for *_, row in chosen])
        shown = summaries.windows(position, activation, rows, self._context, marked)
        tokens = self._scratch.token[position[rows]]
        for (kind, interval, rank, row), token, (indices, values) in zip(
            chosen, tokens, shown, strict=True
        ):
            example = (feature, kind, interval, rank, position[row], activation[row], token)
            self._rows.append((*example, indices, values))

    def pop_all(self) -> pa.Table:
        """The rows collected so far, which are removed from here."""
        rows, self._rows = self._rows, []
        columns = list(zip(*rows, strict=True)) or [()] * len(_EXAMPLE_TYPES)
        return pa.table(
            {
                name: pa.array(column, kind)
                for (name, kind), column in zip(_EXAMPLE_TYPES.items(), columns, strict=True)
            }
        )


def _insert_histograms(job: BuildJob, histograms: list[tuple[int, np.ndarray]]) -> None:
    if not histograms:
        return
    counts = np.stack([bins for _, bins in histograms])
    row, bin_ = np.nonzero(counts)
    feature = np.array([feature for feature, _ in histograms])[row]
    job.insert("histogram", pa.table({"feature": feature, "bin": bin_, "count": counts[row, bin_]}))


def _insert_pairs(job: BuildJob, pairs: list[tuple[int, summaries.Coactive]]) -> None:
    if not pairs:
        return
    lengths = [len(found.other) for _, found in pairs]
    columns = {
        "feature": np.repeat([feature for feature, _ in pairs], lengths),
        "rank": np.concatenate([np.arange(length) for length in lengths]),
        "other": np.concatenate([found.other for _, found in pairs]),
        **{
            name: np.concatenate([getattr(found, name) for _, found in pairs])
            for name in ("together", "share", "pmi", "correlation")
        },
    }
    job.insert("coactivation", pa.table(columns))


def _write_features(job: BuildJob, table: Mapping[str, np.ndarray]) -> None:
    rows = pa.table({**{name: pa.array(column) for name, column in table.items()}, **job.columns})
    job.con.register("rows", rows)
    described = job.con.execute("DESCRIBE SELECT * FROM rows").fetchall()
    for name, kind, *_ in described:
        if name in job.columns:
            job.con.execute(f"ALTER TABLE db.feature ADD COLUMN {identifier(name)} {kind}")
    job.con.execute("INSERT INTO db.feature BY NAME SELECT * FROM rows")
    job.con.unregister("rows")


def _write_meta(job: BuildJob, counts: Mapping[str, int], table: Mapping[str, np.ndarray]) -> None:
    counted = {
        "n_sequences": counts["n_sequences"],
        "n_tokens": counts["n_sequences"] * job.context,
        "n_kept": counts["n_kept"],
        "n_documents": counts["n_documents"],
        "n_activations": job.n_activations,
        "n_live": int((table["n_active"] > 0).sum()),
        "split_kept": {
            "train": counts["n_kept"] - counts["n_held_out"],
            "held_out": counts["n_held_out"],
        },
    }
    values = {**job.meta, **{key: json.dumps(value) for key, value in counted.items()}}
    job.con.executemany("INSERT INTO db.meta VALUES (?, ?)", list(values.items()))
