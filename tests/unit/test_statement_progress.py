"""A long statement of DuckDB is counted while it runs, and exactly once."""

import time
from collections.abc import Sequence

import pytest

from saescope.progress import Progress
from store import statement_progress
from store.database import connect
from store.statement_progress import can_be_watched, watched


class Statement:
    """A connection that says how far it is."""

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = list(shares)
        self.asked = 0

    def query_progress(self) -> float:
        self.asked += 1
        return self._shares.pop(0) if len(self._shares) > 1 else self._shares[0]


def run(statement: Statement, progress: Progress) -> None:
    until = time.monotonic() + 10
    while statement.asked < 5:
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.mark.parametrize("shares", [(0.0, 20.0, 55.0, 50.0, 101.0), (-1.0,), (100.0, 3.0)])
def test_steps_are_counted_once(shares: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statement_progress, "_EVERY_S", 0.001)
    statement, seen = Statement(shares), []
    with Progress("building", 300, "steps") as progress:
        progress.advance(100)
        with watched(statement, progress, 200, "sorting"):
            run(statement, progress)
            seen.append(progress.done)
        assert progress.done == 300
        assert progress._note == "sorting"
    assert seen == [300 if max(shares) >= 100 else 100]


def test_what_failed_is_not_counted_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statement_progress, "_EVERY_S", 0.001)
    statement = Statement([40.0])

    def fails() -> None:
        with watched(statement, progress, 100, "sorting"):
            run(statement, progress)
            raise OSError("full")

    with Progress("building", 100, "steps") as progress:
        with pytest.raises(OSError, match="full"):
            fails()
        assert progress.done == 40


def test_duckdb_says_how_far_it_is_and_prints_nothing(capfd: pytest.CaptureFixture) -> None:
    con = connect(threads=1, memory_limit="100MB")
    can_be_watched(con)
    sql = "SELECT current_setting('enable_progress_bar'), current_setting('progress_bar_time')"
    assert con.execute(sql).fetchone() == (True, 0)
    con.execute("CREATE TABLE t AS SELECT random() AS x FROM range(300000)")
    con.execute("CREATE TABLE u AS SELECT * FROM t ORDER BY x")
    con.close()
    assert capfd.readouterr() == ("", "")
