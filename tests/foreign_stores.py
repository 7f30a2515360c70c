"""Feature stores that somebody else has made, with what no store of ours has in it."""

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb

from saescope.errors import SaescopeError
from store import FeatureFilter, FeatureStore


def altered(good: Path, folder: Path, statements: Sequence[str]) -> Path:
    """A copy of a store in a new folder, on which these statements were run."""
    path = folder / "features.duckdb"
    folder.mkdir(parents=True)
    shutil.copyfile(good, path)
    with duckdb.connect(str(path)) as con:
        for statement in statements:
            con.execute(statement)
    return path


def ask_everything(path: Path) -> None:
    """Ask a store every kind of question about several features."""
    with FeatureStore.open(path, query_seconds=20) as store:
        store.overview()
        store.densities()
        for column in store.columns:
            store.features(FeatureFilter(state="live"), sort=column, limit=3)
        for number in (0, 3, 11, store.d_sae - 1):
            store.feature(number)
            store.histogram(number)
            store.logits(number)
            store.neighbours(number)
            store.coactivating(number, 20)
            store.activations(number, 5)
            store.examples(number, "top", 3)
            store.examples(number, "interval")
            store.top_tokens([number])
        store.features_of_position(2, 5)
        store.features_of_sequence(3)


def said_of(path: Path) -> str:
    """What asking everything says: "" or one of our errors; anything else is raised."""
    said = ""
    try:
        ask_everything(path)
    except SaescopeError as error:
        said = str(error)
    assert "\n" not in said.replace(str(path), "")
    return said


def hostile_statements(proof: Path, secret: Path) -> dict[str, list[str]]:
    """Names and statements: what would write `proof`, read `secret`, never end or mislead."""
    read = f"(SELECT content FROM read_text('{secret}'))"
    write = f"COPY (SELECT 1) TO '{proof}'"

    def column(name: str, kind: str = "INTEGER") -> str:
        return 'ALTER TABLE feature ADD COLUMN "{}" {}'.format(name.replace('"', '""'), kind)

    def viewed(table: str, columns: str) -> list[str]:
        return [
            f"ALTER TABLE {table} RENAME TO kept_{table}",
            f"CREATE VIEW {table} AS SELECT {columns} FROM kept_{table}",
        ]

    endless = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t)"
    return {
        "a column that ends its name": [column(f'x" FROM db.feature; {write}; SELECT 1 AS "y')],
        "a column that ends its name in one": [column("x' FROM db.feature; " + write + " --")],
        "a column of letters that look alike": [column("dеnsity")],
        "a column with a line break": [column("a\nb")],
        "a column of a list": [column("more", "INTEGER[]")],
        "a column of a struct": [column("more", "STRUCT(a INTEGER)")],
        "a column named rowid": [column("rowid", "BIGINT")],
        "a column where none may be": ["ALTER TABLE logit ADD COLUMN extra INTEGER"],
        "a column of another type": ["ALTER TABLE feature ALTER density TYPE VARCHAR"],
        "a column that may be empty": ["ALTER TABLE logit ALTER value DROP NOT NULL"],
        "a column left out": ["ALTER TABLE example DROP COLUMN active_value"],
        "a table left out": ["DROP TABLE histogram"],
        "a table of its own": ["CREATE TABLE more AS SELECT 1 AS x"],
        "a view that reads a file": viewed("document", f"document, key, {read} AS title, split"),
        "a view instead of facts": viewed("meta", f"key, {read} AS value"),
        "a view that never ends": [
            "DROP TABLE meta",
            f"CREATE VIEW meta AS {endless} SELECT 'a' AS key, CAST(n AS VARCHAR) AS value FROM t",
        ],
        "a view beside the tables": ["CREATE VIEW look AS SELECT 1"],
        "a macro": ["CREATE MACRO ceil(x) AS x"],
        "a table macro": [f"CREATE MACRO look() AS TABLE SELECT * FROM read_text('{secret}')"],
        "a schema": ["CREATE SCHEMA other"],
        "a type": ["CREATE TYPE mood AS ENUM ('good', 'bad')"],
        "a type with a plain name": [
            "CREATE TYPE mood AS ENUM ('good', 'bad')",
            column("extra", "mood"),
        ],
        "a sequence": ["CREATE SEQUENCE numbers"],
        "an index": ["CREATE INDEX quick ON logit (feature)"],
        "a default": ["ALTER TABLE feature ALTER density SET DEFAULT random()"],
        "a generated column": [
            "DROP TABLE histogram",
            "CREATE TABLE histogram (feature INTEGER NOT NULL, bin TINYINT NOT NULL,"
            " count BIGINT GENERATED ALWAYS AS (feature * 2) VIRTUAL)",
        ],
        "a check": [
            "DROP TABLE neighbour",
            "CREATE TABLE neighbour (feature INTEGER NOT NULL, rank SMALLINT NOT NULL,"
            " other INTEGER NOT NULL, cosine FLOAT NOT NULL, CHECK (cosine < 2))",
        ],
        "facts without end": [
            "INSERT INTO meta SELECT 'k' || range, '1' FROM range(1_000_000)",
        ],
        "a long fact": ["INSERT INTO meta SELECT 'k', repeat('[', 20_000_000)"],
        "a deep fact": ["INSERT INTO meta SELECT 'k', repeat('[', 200_000)"],
        "a large number": ["UPDATE meta SET value = repeat('9', 4000) WHERE key = 'n_tokens'"],
    }  # fmt: skip


def damaging_statements(chance: random.Random) -> list[str]:
    """Tables that do not fit together, at random; the columns keep their types."""
    anything = str(chance.choice([-(2**31), -1, 0, 63, 64, 999, 2**31 - 1]))
    small = str(chance.choice([-128, -1, 39, 40, 127]))
    of_meta = ("d_sae", "context", "n_kept", "n_live", "n_tokens", "metrics", "name", "kind")
    value = chance.choice(["null", "-1", "0", "1e9", "true", '"x"', "[]", "{}", "{", "99999999"])
    choices: list[Callable[[], str]] = [
        lambda: f"UPDATE feature SET feature = {anything} WHERE feature = 3",
        lambda: f"UPDATE feature SET first_row = {anything} WHERE feature = 11",
        lambda: f"UPDATE feature SET n_active = {anything} WHERE feature = 11",
        lambda: f"UPDATE feature SET max = {chance.choice(['nan', '-inf'])!r}::FLOAT",
        lambda: f"UPDATE histogram SET bin = {small}",
        lambda: f"UPDATE logit SET token_id = {anything}",
        lambda: f"UPDATE neighbour SET other = {anything}",
        lambda: f"UPDATE coactivation SET other = {anything}",
        lambda: f"UPDATE example SET position = {anything}",
        lambda: f"UPDATE example SET token_id = {anything}",
        lambda: f"UPDATE example SET active_place = [{anything}]",
        lambda: "UPDATE example SET active_value = []",
        lambda: "UPDATE example SET active_place = [NULL], active_value = [NULL]",
        lambda: f"UPDATE sequence SET tokens = [{anything}]",
        lambda: f"UPDATE sequence SET tokens = list_transform(tokens, lambda t: {anything})",
        lambda: "UPDATE sequence SET document = list_transform(document, lambda t: NULL)",
        lambda: f"UPDATE sequence SET sequence = {anything}",
        lambda: f"UPDATE vocabulary SET token_id = {anything} WHERE token_id = 4",
        lambda: f"DELETE FROM {chance.choice(['vocabulary', 'sequence', 'document', 'feature'])}",
        lambda: "UPDATE vocabulary SET bytes = '\\xff'::BLOB",
        lambda: f"UPDATE meta SET value = '{value}' WHERE key = '{chance.choice(of_meta)}'",
        lambda: f"DELETE FROM meta WHERE key = '{chance.choice(of_meta)}'",
    ]
    return [chance.choice(choices)() for _ in range(chance.randint(1, 2))]


def flip_bytes(path: Path, chance: random.Random) -> None:
    """Damage a few bytes of a file, or cut it off."""
    content = bytearray(path.read_bytes())
    if chance.random() < 0.3:
        path.write_bytes(content[: chance.randrange(len(content))])
        return
    for _ in range(chance.randint(1, 40)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
