"""A feature store made by anybody: nothing in it is run, nothing else is read, one line is said."""

import os
import time
from pathlib import Path

import duckdb
import pytest

from saescope.errors import ArtefactError, InputError
from store import FeatureStore
from store.checking import check_store
from store.database import Database
from tests.foreign_stores import altered, ask_everything, hostile_statements, said_of
from tests.tiny_store import make_tiny_store

HOSTILE = sorted(hostile_statements(Path("proof"), Path("secret")))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("good"))


def test_a_store_of_ours_answers_everything(good: Path) -> None:
    ask_everything(good)


def test_a_plain_column_of_measurements_is_welcome(good: Path, tmp_path: Path) -> None:
    path = altered(good, tmp_path / "s", ["ALTER TABLE feature ADD COLUMN score DOUBLE DEFAULT 2"])
    assert "expression" in said_of(path)
    path = altered(good, tmp_path / "t", ["ALTER TABLE feature ADD COLUMN score DOUBLE"])
    with FeatureStore.open(path) as features:
        assert features.feature(3).more["score"] is None
        assert "score" in features.columns


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_store_has_not_is_refused(good: Path, tmp_path: Path, name: str) -> None:
    proof, secret = tmp_path / "proof.txt", tmp_path / "secret.txt"
    secret.write_text("a secret")
    path = altered(good, tmp_path / "s", hostile_statements(proof, secret)[name])
    started = time.monotonic()
    with pytest.raises(ArtefactError) as raised:
        FeatureStore.open(path)
    assert time.monotonic() - started < 20
    assert "\n" not in str(raised.value)
    assert "a secret" not in str(raised.value)
    assert not proof.exists()


def test_an_open_store_is_locked_in(good: Path, tmp_path: Path) -> None:
    secret, proof = tmp_path / "secret.txt", tmp_path / "proof"
    secret.write_text("a secret")
    with FeatureStore.open(good) as features:
        for sql in (
            f"SELECT * FROM read_text('{secret}')",
            f"SELECT * FROM '{good.parent}/*'",
            f"COPY (SELECT 1) TO '{proof}'",
            f"ATTACH '{proof}' AS more",
            f"EXPORT DATABASE '{proof}'",
            "SET enable_external_access = true",
            "SET threads = 8",
            "INSTALL httpfs",
        ):
            with pytest.raises((ArtefactError, duckdb.Error)):
                features._rows(sql)
    assert not proof.exists()


def test_a_query_without_end_is_ended(good: Path) -> None:
    db = Database(good, threads=1, memory_limit="100MB", seconds=0.5)
    check_store(db)
    endless = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT 1 FROM t) SELECT sum(n) FROM t"
    started = time.monotonic()
    with pytest.raises(ArtefactError, match=r"more than 0.5 s"):
        db.rows(endless)
    assert time.monotonic() - started < 30
    assert db.rows("SELECT count(*) FROM db.feature") == [(64,)], "others go on"
    db.close()
    with pytest.raises(ArtefactError):
        db.rows("SELECT 1")
    with pytest.raises(InputError, match="query_seconds"):
        FeatureStore.open(good, query_seconds=0)


def test_a_log_beside_a_store_is_not_played(good: Path, tmp_path: Path) -> None:
    path = altered(good, tmp_path / "s", [])
    log = path.with_name("features.duckdb.wal")
    os.mkfifo(log)  # reading it would never end
    with pytest.raises(ArtefactError, match=r"features.duckdb.wal lies beside it"):
        FeatureStore.open(path)
    log.unlink()
    FeatureStore.open(path).close()


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("UPDATE histogram SET bin = 40", "histogram"),
        ("UPDATE histogram SET bin = -1", "histogram"),
        ("UPDATE logit SET token_id = 9999", "vocabulary"),
        ("UPDATE logit SET token_id = -1", "vocabulary"),
        ("UPDATE neighbour SET other = 64", "feature"),
        ("UPDATE coactivation SET other = -1", "feature"),
        ("UPDATE example SET position = 16 * 40", "sequence"),
        ("UPDATE example SET position = -1", "sequence"),
        ("UPDATE example SET active_place = [16]", "example"),
        ("UPDATE example SET active_value = []", "example"),
        ("UPDATE sequence SET tokens = tokens[1:3]", "sequence"),
        ("UPDATE sequence SET tokens = list_transform(tokens, lambda t: 500)", "sequence"),
        ("UPDATE sequence SET document = list_transform(document, lambda t: NULL)", "sequence"),
        ("DELETE FROM vocabulary WHERE token_id = 4", "vocabulary"),
        ("UPDATE feature SET feature = 4 WHERE feature = 3", "table of features"),
        ("UPDATE feature SET n_active = 9999 WHERE feature = 3", "table of features"),
        ("UPDATE meta SET value = '65' WHERE key = 'd_sae'", "table of features"),
        ("UPDATE meta SET value = '0' WHERE key = 'context'", "meta.context"),
        ("UPDATE meta SET value = 'true' WHERE key = 'n_live'", "meta.n_live"),
        ("DELETE FROM meta WHERE key = 'n_kept'", "meta.n_kept"),
        ("UPDATE meta SET value = '\"good\"' WHERE key = 'metrics'", "meta.metrics"),
    ],
)
def test_tables_that_do_not_fit_together(
    good: Path, tmp_path: Path, statement: str, table: str
) -> None:
    said = said_of(altered(good, tmp_path / "s", [statement]))
    assert "damaged" in said
    assert table in said


@pytest.mark.parametrize(
    "name", ["a?mode=rw&x=%41", "back\\slash", "it's #1", 'quo"te;--', "\udcff\udcfe", "a\nb", "~"]
)
def test_any_path_is_the_path(tmp_path: Path, name: str) -> None:
    folder = tmp_path / f"above {name}" / name
    path = make_tiny_store(folder)
    assert path.parent.parent == folder
    assert sorted(p.name for p in path.parent.iterdir()) == ["features.duckdb"]
    said = said_of(path)
    if "\udcff" in name:
        assert said == "" or "read" in said
    else:
        assert said == ""
    renamed = path.with_name(f"{name}.duckdb")
    path.rename(renamed)
    assert said_of(renamed) == said.replace("features.duckdb", renamed.name)
    assert [p.name for p in tmp_path.iterdir()] == [f"above {name}"]
