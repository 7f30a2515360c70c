"""The writer's checks, its failures, and the summaries' functions on awkward rows."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saescope.errors import ArtefactError, InputError
from store import FeatureStore, StoreWriter, summaries
from store.database import clear_errors
from tests.tiny_store import make_tiny_store

CONTEXT = 4


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[StoreWriter]:
    """A writer with 3 sequences of 4 tokens, position 0 not kept."""
    made = StoreWriter(tmp_path / "s.duckdb", meta={}, d_sae=6, context=CONTEXT, threads=1)
    made.__enter__()
    fill(made)
    yield made
    with pytest.raises(RuntimeError, match="finish"):
        made.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def fill(writer: StoreWriter) -> None:
    writer.add_vocabulary(["a", "b", "c"])
    keep = np.ones((3, CONTEXT), dtype=bool)
    keep[:, 0] = False
    tokens = np.arange(12).reshape(3, CONTEXT) % 3
    writer.add_sequences(0, tokens, np.zeros((3, CONTEXT), int), keep, np.zeros(3, int))


def test_one_token_sequences(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with StoreWriter(path, meta={}, d_sae=3, context=1, threads=1) as writer:
        writer.add_vocabulary(["a"])
        shape = (30, 1)
        writer.add_sequences(
            5, np.zeros(shape, int), np.arange(30)[:, None], np.ones(shape), [0] * 30
        )
        writer.add_activations(np.arange(5, 35), np.ones(30, int), np.full(30, 2.0))
        rows = writer.finish()
    assert rows["activation_by_feature"] == rows["activation_by_position"] == 30
    with FeatureStore.open(path) as features:
        row = features.feature(1)
        assert (row.density, row.n_documents, row.std) == (1.0, 30, 0.0)
        # all are tied: the earliest positions come first
        assert [e.sequence for e in features.examples(1)] == list(range(5, 25))
        assert [e.tokens for e in features.examples(1, window=5)] == [["a"]] * 20
        examples = features.examples(1, "interval")
        assert [e.interval for e in examples] == [4] * 5
        assert features.examples(1)[0].title == ""


def test_a_store_without_activations(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with StoreWriter(path, meta={}, d_sae=6, context=CONTEXT, threads=1) as writer:
        fill(writer)
        writer.add_activations([], np.zeros(0, int), [])
        writer.finish()
    with FeatureStore.open(path) as features:
        assert features.overview().n_dead == 6
        assert features.random_live() is None
        assert features.next_live(0) is None
        assert features.features().total == 6
        assert features.examples(0) == []
        assert features.coactivating(0) == []


@pytest.mark.parametrize(
    ("position", "feature", "activation", "message"),
    [
        ([1], [6], [1.0], "feature: out of range .given: 6; allowed: 0 to 5"),
        ([1], [-1], [1.0], "feature: out of range"),
        ([-1], [0], [1.0], "position: out of range"),
        ([1], [0], [0.0], "above zero"),
        ([1], [0], [-2.0], "above zero"),
        ([1], [0], [np.nan], "above zero"),
        ([1], [0], [np.inf], "above zero"),
        ([1, 2], [0], [1.0], "differ in length"),
        ([1.5], [0], [1.0], "position: must be integers"),
        ([[1]], [0], [1.0], "one dimension"),
    ],
)
def test_wrong_activations(
    writer: StoreWriter, position: list, feature: list, activation: list, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        writer.add_activations(np.array(position), np.array(feature), np.array(activation))


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ([5, 5], "given twice .given: 'position 5, feature 2'"),
        ([4, 5], "not kept"),
        ([5, 12], "in no sequence"),
    ],
)
def test_activations_that_do_not_fit(
    writer: StoreWriter, position: list[int], message: str
) -> None:
    writer.add_activations(np.array(position), np.array([2, 2]), np.array([1.0, 2.0]))
    with pytest.raises(InputError, match=message):
        writer.finish()


def test_a_gap_between_sequences_is_no_kept_position(writer: StoreWriter) -> None:
    shape = (1, CONTEXT)
    writer.add_sequences(9, np.zeros(shape, int), np.zeros(shape, int), np.ones(shape), [1])
    writer.add_activations(np.array([5 * CONTEXT + 1]), np.array([0]), np.array([1.0]))
    with pytest.raises(InputError, match="not kept"):
        writer.finish()


def test_sequences_that_do_not_fit(writer: StoreWriter) -> None:
    shape = (1, CONTEXT)
    ones = np.ones(shape, dtype=int)
    with pytest.raises(InputError, match="tokens: has a wrong shape"):
        writer.add_sequences(3, ones[:, :2], ones, ones, [0])
    with pytest.raises(InputError, match="document: has a wrong shape"):
        writer.add_sequences(3, ones, ones[0], ones, [0])
    with pytest.raises(InputError, match="first"):
        writer.add_sequences(-1, ones, ones, ones, [0])
    writer.add_sequences(2, ones, ones, ones, [0])
    with pytest.raises(InputError, match="sequence was given twice"):
        writer.finish()


@pytest.mark.parametrize("token", [-1, 3])
def test_a_token_without_text(writer: StoreWriter, token: int) -> None:
    ones = np.ones((1, CONTEXT), dtype=int)
    writer.add_sequences(7, ones * token, ones, ones, [0])
    with pytest.raises(InputError, match=f"no text.*{token}"):
        writer.finish()


def test_other_wrong_parts(writer: StoreWriter) -> None:
    with pytest.raises(InputError, match="already given"):
        writer.add_vocabulary(["x"])
    with pytest.raises(InputError, match=r"features.norm: wrong length .given: 2; allowed: 6"):
        writer.add_features({"norm": [1, 2]})
    with pytest.raises(InputError, match="there already"):
        writer.add_features({"density": np.zeros(6)})
    with pytest.raises(InputError, match="plain"):
        writer.add_features({'x"; DROP TABLE meta': np.zeros(6)})
    with pytest.raises(InputError, match="documents: columns are missing"):
        writer.add_documents(pa.table({"document": [1]}))
    with pytest.raises(InputError, match="unknown split"):
        writer.add_documents(
            pa.table({"document": [1], "key": ["a"], "title": ["b"], "split": ["test"]})
        )
    with pytest.raises(InputError, match="sign"):
        writer.add_logits([0], [2], [0], [0], [1.0])
    with pytest.raises(InputError, match="other: out of range"):
        writer.add_neighbours([0], [0], [6], [1.0])


def test_missing_parts(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"

    def build(*texts: str) -> None:
        with StoreWriter(path, meta={}, d_sae=2, context=2, threads=1) as writer:
            if texts:
                writer.add_vocabulary(texts)
            writer.finish()

    with pytest.raises(InputError, match="vocabulary"):
        build()
    with pytest.raises(InputError, match="sequences"):
        build("a")
    with pytest.raises(InputError, match="d_sae"):
        StoreWriter(path, meta={}, d_sae=0, context=2)
    with pytest.raises(InputError, match=r"meta: .*itself.*schema"):
        StoreWriter(path, meta={"schema": 7}, d_sae=1, context=2)
    with pytest.raises(InputError, match="JSON"):
        StoreWriter(path, meta={"x": object()}, d_sae=1, context=2)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_the_old_store(tmp_path: Path) -> None:
    path = make_tiny_store(tmp_path)
    before = path.read_bytes()

    def build() -> None:
        with StoreWriter(path, meta={}, d_sae=6, context=CONTEXT, threads=1) as writer:
            fill(writer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_killed_build_leaves_no_store(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    script = f"""
        import os, signal
        from store import StoreWriter
        with StoreWriter({str(path)!r}, meta={{}}, d_sae=6, context=4, threads=1) as writer:
            writer.add_vocabulary(["a"])
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="disk is full"), clear_errors(tmp_path / "s.duckdb"):
        raise duckdb.IOException("Could not write file: No space left on device")
    with pytest.raises(ArtefactError, match="needs more"), clear_errors(tmp_path / "s.duckdb"):
        raise duckdb.OutOfMemoryException("Out of Memory Error: failed to offload data")
    with pytest.raises(duckdb.BinderException), clear_errors(tmp_path / "s.duckdb"):
        raise duckdb.BinderException("a mistake of ours stays what it is")


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        StoreWriter(tmp_path / "file" / "s.duckdb", meta={}, d_sae=1, context=1).__enter__()


def test_extra_columns_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with StoreWriter(path, meta={"name": "x"}, d_sae=6, context=CONTEXT, threads=1) as writer:
        fill(writer)
        writer.add_activations(np.array([5]), np.array([2]), np.array([1.0]))
        writer.add_features(pa.table({"norm": pa.array(np.arange(6), pa.float32())}))
        writer.add_features({"group": np.array(list("abcdef"))})
        writer.finish()
    with FeatureStore.open(path) as features:
        assert features.feature(4).more == {"norm": 4.0, "group": "e"}
        page = features.features(sort="norm", descending=True, limit=2)
        assert page.rows.column("feature").to_pylist() == [5, 4]
        assert features.meta["name"] == "x"


def test_large_scratch_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    position = rng.permutation(4000).astype(np.int64)[:1500]
    activation = np.sort(rng.random(1500).astype(np.float32) + 0.01)[::-1].copy()
    document = (np.arange(4000) // 37).astype(np.int32)
    marked = np.full(250, -1, dtype=np.int32)
    rows = np.array([0, 7, 1499])

    def everything() -> list:
        seen = np.ones(document.max() + 3, dtype=bool)
        shown = summaries.windows(position, activation, rows, 16, marked)
        return [
            summaries.histogram(activation).tolist(),
            summaries.count_documents(position, document, seen),
            [(place.tolist(), value.tolist()) for place, value in shown],
        ]

    whole = everything()
    assert (marked == -1).all()
    monkeypatch.setattr(summaries, "_BLOCK", 64)
    assert everything() == whole
    assert whole[1] == len(np.unique(document[position]))


@given(st.lists(st.integers(1, 2**20), min_size=1, max_size=60))
def test_bins_are_closed_on_the_right(values: list[int]) -> None:
    activation = np.sort(np.array(values, dtype=np.float32))[::-1].copy()
    top = int(activation[0])
    # exact integer arithmetic: bin b holds b * top < 40 a <= (b + 1) * top
    wanted = np.bincount([-(-40 * v // top) - 1 for v in values], minlength=40)
    np.testing.assert_array_equal(summaries.histogram(activation), wanted)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 5))
def test_first_of_each(sequence: list[int], limit: int) -> None:
    wanted = [i for i, s in enumerate(sequence) if s not in sequence[:i]][:limit]
    assert summaries.first_of_each(np.array(sequence, dtype=int), limit).tolist() == wanted


def test_top_rows_reach_behind_one_long_run() -> None:
    # the 3000 strongest are all in sequence 0, so the rest is found only far behind
    position = np.concatenate([np.arange(3000), np.arange(3, 60) * 3000])
    rows = summaries.top_rows(position, context=3000)
    assert rows.tolist() == [0, *range(3000, 3019)]


def brute_force(fires: np.ndarray) -> tuple[Any, Any, Any]:
    """Counts, correlations and PMIs [F, F] of firings [F, positions], from dense matrices."""
    dense = fires.astype(np.float64)
    together = (dense @ dense.T).astype(int)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = dense.mean(axis=1)
        pmi = np.log((together / fires.shape[1]) / np.outer(share, share))
        correlation = np.corrcoef(dense)
    return together, correlation, pmi


def test_coactivation_is_counted_over_all_positions(tmp_path: Path) -> None:
    # 40 features, 6,000 positions; 1 fires with 0 more often than by chance, by a little
    rng = np.random.default_rng(3)
    context, n_sequences, n_features = 7, 1000, 40
    fires = (
        rng.random((n_features, n_sequences * (context - 1))) < np.linspace(0.6, 0.002, 40)[:, None]
    )
    fires[1] = rng.random(fires.shape[1]) < np.where(fires[0], 0.21, 0.2)
    fires[38] = fires[39]
    keep = np.ones((n_sequences, context), dtype=bool)
    keep[:, 0] = False
    feature, column = fires.nonzero()
    path = tmp_path / "s.duckdb"
    with StoreWriter(path, meta={}, d_sae=n_features, context=context, threads=2) as writer:
        writer.add_vocabulary(["a"])
        zeros = np.zeros((n_sequences, context), int)
        writer.add_sequences(0, zeros, zeros, keep, np.zeros(n_sequences, int))
        order = rng.permutation(len(feature))
        at = np.flatnonzero(keep)[column]
        writer.add_activations(at[order], feature[order], rng.random(len(feature)) + 0.1)
        writer.finish()
    together, correlation, pmi = brute_force(fires)
    np.fill_diagonal(correlation, -1)
    with FeatureStore.open(path) as features:
        for number in range(n_features):
            found = features.coactivating(number, 20)
            wanted = np.lexsort((np.arange(n_features), -correlation[number].round(9)))[:20]
            wanted = [int(other) for other in wanted if correlation[number, other] > 1e-12]
            assert [c.feature for c in found] == wanted
            for c in found:
                assert c.together == together[number, c.feature]
                assert c.share == pytest.approx(c.together / fires[number].sum(), rel=1e-6)
                assert c.correlation == pytest.approx(correlation[number, c.feature], rel=1e-6)
                assert c.pmi == pytest.approx(pmi[number, c.feature], rel=1e-5, abs=1e-6)
        (twin,) = [c for c in features.coactivating(39, 20) if c.feature == 38]
        assert twin.correlation == 1


def test_counts_do_not_depend_on_the_size_of_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 6, 500)
    scratch = summaries.Scratch.create(tmp_path, n=int(lengths.sum()), positions=500)
    scratch.start[1:] = np.cumsum(lengths)
    scratch.other[:] = rng.integers(0, 9, lengths.sum())
    scratch.document[:] = 0
    position = rng.permutation(np.flatnonzero(lengths))[:200]
    wanted = np.zeros(9, dtype=int)
    for at in position:
        for other in scratch.other[scratch.start[at] : scratch.start[at + 1]]:
            wanted[other] += 1
    for block in (1, 10, 1 << 20):
        found = summaries.count_together(position, scratch, 9, block=block)
        np.testing.assert_array_equal(found, wanted)


def test_moments_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    activation = (rng.random(5000) * 1e-3 + 4000).astype(np.float32)
    exact = activation.astype(np.longdouble)
    for block in (1 << 20, 7):
        monkeypatch.setattr(summaries, "_BLOCK", block)
        mean, std = summaries.moments(activation)
        assert mean == pytest.approx(float(exact.mean()), rel=1e-14)
        assert std == pytest.approx(float(exact.std()), rel=1e-9, abs=1e-9)


def test_the_same_rows_make_the_same_store(tmp_path: Path) -> None:
    def build(folder: Path) -> Path:
        rng = np.random.default_rng(1)
        keep = np.ones((3000, 8), dtype=bool)
        path = folder / "s.duckdb"
        with StoreWriter(path, meta={"a": 1}, d_sae=16, context=8, threads=4) as writer:
            writer.add_vocabulary(["a", "b"])
            zeros = np.zeros((3000, 8), int)
            writer.add_sequences(0, zeros, zeros, keep, np.zeros(3000, int))
            at = np.repeat(np.arange(24_000), 8)
            which = np.argsort(rng.random((24_000, 16)), axis=1)[:, :8].ravel()
            for part in np.array_split(rng.permutation(len(at)), 3):
                writer.add_activations(at[part], which[part], rng.random(len(part)) + 0.1)
            writer.finish()
        return path

    def content(path: Path) -> dict[str, list]:
        with duckdb.connect(str(path), read_only=True) as con:
            tables = [row[0] for row in con.execute("SHOW TABLES").fetchall()]
            return {name: con.execute(f"FROM {name}").fetchall() for name in tables}

    first = content(build(tmp_path / "first"))
    assert len(first["activation_by_feature"]) == 192_000
    for attempt in range(3):
        assert content(build(tmp_path / f"again {attempt}")) == first


def test_room_is_taken_before_it_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = summaries.Scratch.create(tmp_path, n=5000, positions=300)
    for name in ("position", "activation", "other", "start", "document", "token"):
        file = tmp_path / name
        assert file.stat().st_blocks * 512 >= file.stat().st_size, name
    assert scratch.position.sum() == scratch.start.sum() == 0

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = set(tmp_path.iterdir())

    def build() -> None:
        with StoreWriter(
            tmp_path / "s.duckdb", meta={}, d_sae=6, context=CONTEXT, threads=1
        ) as writer:
            fill(writer)
            writer.finish()

    with pytest.raises(ArtefactError, match="disk is full"):
        build()
    assert set(tmp_path.iterdir()) == before


def test_memory_limit_is_set(writer: StoreWriter) -> None:
    setting = "SELECT current_setting('memory_limit'), current_setting('temp_directory')"
    limit, spill = writer._con.execute(setting).fetchone()
    assert limit == "1.3 GiB"
    assert Path(spill).parent == writer._scratch
    assert writer._scratch.parent.parent == writer.path.parent
