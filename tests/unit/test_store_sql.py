"""A reader's SQL: answers, limits, and what it cannot reach."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from saescope.__main__ import main
from saescope.errors import ArtefactError, InputError
from store import FeatureStore
from store.schema_help import COLUMNS
from tests.tiny_store import D_SAE, EVERYWHERE, make_rows, make_tiny_store

ROWS = make_rows()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def features(path: Path) -> Iterator[FeatureStore]:
    with FeatureStore.open(path) as opened:
        yield opened


def test_an_answer_is_an_arrow_table(features: FeatureStore) -> None:
    found = features.sql(
        "SELECT feature, count(*) AS n FROM activation_by_position GROUP BY ALL ORDER BY ALL;"
    )
    assert isinstance(found, pa.Table)
    counts = np.bincount(ROWS.feature, minlength=D_SAE)
    assert found["feature"].to_pylist() == np.flatnonzero(counts).tolist()
    assert found["n"].to_pylist() == counts[counts > 0].tolist()


@pytest.mark.parametrize(
    ("query", "column", "first"),
    [
        ("WITH x AS (SELECT 3 AS y) FROM x", "y", 3),
        ("VALUES (4)", "col0", 4),
        ("-- a comment\nSELECT max(feature) AS m FROM db.feature", "m", D_SAE - 1),
        ("SHOW TABLES", "name", "activation_by_feature"),
        ("DESCRIBE feature", "column_name", "feature"),
        ("SELECT ';' AS a", "a", ";"),
    ],
)
def test_statements_that_read(
    features: FeatureStore, query: str, column: str, first: object
) -> None:
    assert features.sql(query)[column][0].as_py() == first


def test_an_answer_without_rows_has_its_columns(features: FeatureStore) -> None:
    found = features.sql("SELECT feature, max FROM feature WHERE feature < 0")
    assert (found.num_rows, found.column_names) == (0, ["feature", "max"])


def test_tables_and_their_columns(features: FeatureStore) -> None:
    tables = {table.name: table for table in features.tables()}
    assert set(tables) == {row["name"] for row in features.sql("SHOW TABLES").to_pylist()}
    assert next(iter(tables)) == "feature"
    columns = [(c.name, c.type) for c in tables["activation_by_feature"].columns]
    assert columns == [("feature", "INTEGER"), ("activation", "FLOAT"), ("position", "BIGINT")]
    assert tables["feature"].columns[-1].name == "encoder_bias"
    assert tables["feature"].columns[-1].about == "added by the indexer"


def test_every_table_and_column_is_explained(features: FeatureStore) -> None:
    tables = features.tables()
    assert [t.name for t in tables if not t.about] == []
    known = {f"{t.name}.{c.name}" for t in tables for c in t.columns}
    assert {f"{t.name}.{c.name}" for t in tables for c in t.columns if not c.about} == set()
    assert COLUMNS.keys() - known == set(), "explained, but in no table"


SLOW = "SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b"
ATTACKS = {
    "SELECT 1; SELECT 2": "has to be one statement",
    "SELECT 1; DROP TABLE feature": "has to be one statement",
    "": "has to be one statement",
    "-- nothing": "has to be one statement",
    "DROP TABLE feature": "only reads",
    "DELETE FROM feature": "only reads",
    "UPDATE feature SET max = 0": "only reads",
    "INSERT INTO feature SELECT * FROM feature": "only reads",
    "CREATE TABLE memory.main.x AS SELECT 1": "only reads",
    "CREATE MACRO f(x) AS x": "only reads",
    "CREATE TEMP TABLE x AS SELECT 1": "only reads",
    "EXPLAIN ANALYZE CREATE TABLE memory.main.x AS SELECT 1": "only reads",
    "SET threads = 8": "only reads",
    "SET enable_external_access = true": "only reads",
    "PRAGMA enable_profiling": "only reads",
    "CALL enable_logging()": "only reads",
    "ATTACH '{folder}/other.db'": "only reads",
    "DETACH db": "only reads",
    "USE memory": "only reads",
    "COPY feature TO '{folder}/stolen.csv'": "only reads",
    "COPY (SELECT 1) TO '{folder}/stolen.csv'": "only reads",
    "EXPORT DATABASE '{folder}'": "only reads",
    "INSTALL httpfs": "only reads",
    "LOAD httpfs": "only reads",
    "BEGIN": "only reads",
    "PREPARE a AS SELECT 1": "only reads",
    "SELECT * FROM read_text('{folder}/secret.txt')": "reads the store only",
    "SELECT * FROM read_csv('{folder}/secret.txt')": "reads the store only",
    "SELECT * FROM read_parquet('https://localhost/x.parquet')": "reads the store only",
    "SELECT * FROM read_blob('{folder}/*')": "reads the store only",
    "SELECT * FROM glob('{folder}/*')": "reads the store only",
    "SELECT * FROM '{folder}/secret.txt'": "does not exist",
    "SELECT * FROM features": "does not exist",  # a variable of Python's
    "SELECT getenv('HOME')": "does not exist",
    "SELECT * FROM query('DROP TABLE feature')": "Expected a single SELECT",
    "SELECT * FROM enable_logging()": "locked",
    "SELECT ?": "has parameters",
    "SELECT $name": "has parameters",
    "SELEC 1": "syntax error",
    "SELECT nothing FROM feature": "nothing",
    "SELECT error('a message of its own')": "a message of its own",
    "SELECT 1/0 + 'x'::INTEGER": "Could not convert",
}


@pytest.mark.parametrize("query", ATTACKS)
def test_what_a_statement_cannot_do(features: FeatureStore, tmp_path: Path, query: str) -> None:
    (tmp_path / "secret.txt").write_text("secret\n")
    before = features.path.read_bytes()
    with pytest.raises(InputError, match=ATTACKS[query]) as caught:
        features.sql(query.replace("{folder}", str(tmp_path)))
    said = str(caught.value)
    assert said.startswith("query: ")
    assert "\n" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["secret.txt"]
    assert features.path.read_bytes() == before
    assert features.sql("SHOW TABLES").num_rows == len(features.tables())
    assert features.feature(EVERYWHERE).density == 1.0


def test_the_limits_are_named(features: FeatureStore) -> None:
    with pytest.raises(InputError, match=r"too long \(allowed: at most 3 rows; add LIMIT 3\)"):
        features.sql("SELECT * FROM feature", most_rows=3)
    assert features.sql("SELECT * FROM feature LIMIT 3", most_rows=3).num_rows == 3
    with pytest.raises(InputError, match=r"result is too large \(allowed: at most 64 MiB\)"):
        features.sql("SELECT repeat('x', 70000000)")
    with pytest.raises(InputError, match=r"is too long \(given: '100001 characters'"):
        features.sql("SELECT 1".ljust(100_001))
    with pytest.raises(InputError, match=r"needs too much memory|out of memory"):
        features.sql(
            "SELECT count(*) FROM (SELECT DISTINCT range, repeat('x', 200) FROM range(100000000))",
            seconds=120,
        )
    began = time.monotonic()
    with pytest.raises(InputError, match=r"took more than 0\.2 s and was ended"):
        features.sql(SLOW, seconds=0.2)
    assert time.monotonic() - began < 10
    for seconds in (0, -1, "1"):
        with pytest.raises(InputError, match="seconds"):
            features.sql("SELECT 1", seconds=seconds)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="most_rows"):
        features.sql("SELECT 1", most_rows=0)
    with pytest.raises(InputError, match="is no text"):
        features.sql(b"SELECT 1")  # type: ignore[arg-type]


def test_a_long_statement_holds_up_nobody_else(features: FeatureStore) -> None:
    def slow() -> None:
        with pytest.raises(InputError, match="took more than 1 s"):
            features.sql(SLOW, seconds=1)

    thread = threading.Thread(target=slow)
    thread.start()
    for _ in range(5):
        assert features.sql("SELECT count(*) AS n FROM feature")["n"].to_pylist() == [D_SAE]
        assert features.feature(EVERYWHERE).density == 1.0
    assert thread.is_alive()
    thread.join()


def test_a_closed_store_says_so(path: Path) -> None:
    features = FeatureStore.open(path)
    features.close()
    with pytest.raises(ArtefactError):
        features.sql("SELECT 1")


def test_the_command_prints_a_table_or_csv(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = "SELECT feature, max, 'a,b' || chr(27) AS t FROM feature WHERE feature IN (3, 11)"
    assert main(["sql", str(path), f"{query} ORDER BY feature DESC"]) == 0
    out = capsys.readouterr().out
    top = ROWS.activation[ROWS.feature == 3].max()
    assert out == (
        f"feature    max  t\n     11    1.5  a,b\\x1b\n      3  {top:5.6g}  a,b\\x1b\n2 rows\n"
    )
    assert main(["sql", str(path.parent), "SELECT 'a,b' || chr(10) AS t, NULL AS n", "--csv"]) == 0
    assert capsys.readouterr().out == 't,n\n"a,b\n",\n'
    assert main(["sql", str(path)]) == 0
    assert "activation_by_feature" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which store?"),
        (["{store}", "DROP TABLE feature"], "only reads"),
        (["{store}", "SELECT * FROM feature", "--rows", "2"], "at most 2 rows; add LIMIT 2"),
        (["nowhere"], "no feature store here"),
    ],
)
def test_what_the_command_refuses(
    path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["sql", *(word.replace("{store}", str(path)) for word in words)]) == 2
    assert said in capsys.readouterr().err
