"""Every query of the store against plain numpy on the rows that went in."""

import sqlite3
import threading
from pathlib import Path

import duckdb
import numpy as np
import pytest

from saescope.errors import ArtefactError, InputError
from store import FeatureFilter, FeatureStore
from store.profiles import Kept
from store.vocabulary import join_partial
from tests.older_stores import as_store_schema
from tests.tiny_store import (
    CONTEXT,
    D_SAE,
    DEAD,
    EVERYWHERE,
    META,
    N_DOCUMENTS,
    N_SEQUENCES,
    RARE,
    WORDS,
    Rows,
    make_rows,
    make_tiny_store,
)

ROWS = make_rows()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def features(path: Path):
    with FeatureStore.open(path) as opened:
        yield opened


def of_feature(feature: int, rows: Rows = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Positions and activations, strongest first, ties by position."""
    mine = rows.feature == feature
    position, activation = rows.position[mine], rows.activation[mine]
    order = np.lexsort((position, -activation))
    return position[order], activation[order]


def test_statistics_match_numpy(features: FeatureStore) -> None:
    kept = ROWS.keep.sum()
    for number in range(D_SAE):
        row = features.feature(number)
        position, activation = of_feature(number)
        assert row.n_active == len(position)
        assert row.density == pytest.approx(len(position) / kept, rel=1e-12)
        assert row.n_documents == len(np.unique(ROWS.document.ravel()[position]))
        assert row.dead == (number in DEAD)
        if len(position):
            assert row.mean == pytest.approx(activation.astype(np.float64).mean(), rel=1e-9)
            assert row.std == pytest.approx(activation.astype(np.float64).std(), abs=1e-9)
            assert row.max == activation.max()
        else:
            assert (row.mean, row.std, row.max) == (0, 0, 0)
        assert row.more["encoder_bias"] == pytest.approx(np.linspace(-1, 1, D_SAE)[number])
    assert features.feature(EVERYWHERE).density == 1.0
    np.testing.assert_allclose(
        features.densities(), np.bincount(ROWS.feature, minlength=D_SAE) / kept
    )


def test_rare_feature_by_hand(features: FeatureStore) -> None:
    row = features.feature(RARE)
    assert (row.n_active, row.max, row.mean, row.std, row.n_documents) == (1, 1.5, 1.5, 0.0, 1)
    position, activation = features.activations(RARE)
    assert position.tolist() == [2 * CONTEXT + 5]
    assert activation.tolist() == [1.5]
    assert features.histogram(RARE).counts.nonzero()[0].tolist() == [39]
    (example,) = features.examples(RARE)
    assert (example.sequence, example.index, example.rank) == (2, 5, 0)
    (example,) = features.examples(RARE, "interval")
    assert (example.interval, example.rank) == (4, 0)


def test_profiles_match_brute_force(features: FeatureStore) -> None:
    token, keep = ROWS.tokens.ravel(), ROWS.keep.ravel()
    for number in range(D_SAE):
        position, activation = of_feature(number)
        profile = features.token_profile(number)
        counts = np.bincount(token[position], minlength=len(WORDS))
        expected = sorted(np.flatnonzero(counts), key=lambda t: (-counts[t], t))[:20]
        assert [each.token_id for each in profile] == expected
        for each in profile:
            here = token[position] == each.token_id
            assert each.count == here.sum()
            assert each.share == pytest.approx(here.sum() / (keep & (token == each.token_id)).sum())
            assert each.mean == pytest.approx(activation[here].astype(np.float64).mean(), rel=1e-6)
        where = features.position_profile(number)
        assert where.edges.tolist() == list(range(CONTEXT + 1))  # 16 indices, a bin each
        np.testing.assert_array_equal(
            where.counts, np.bincount(position % CONTEXT, minlength=CONTEXT)
        )
        np.testing.assert_array_equal(where.kept, ROWS.keep.sum(0))
    assert len(features.token_profile(EVERYWHERE, 3)) == 3
    (rare,) = features.token_profile(RARE)
    assert (rare.token_id, rare.count, rare.mean) == (int(ROWS.tokens[2, 5]), 1, 1.5)


def test_position_bins_of_long_sequences() -> None:
    """Of 100 indices 32 bins: the first three have 4, 3 and 3."""
    kept = Kept.count(np.zeros(300, int), np.ones(300, bool), n_tokens=1, context=100)
    assert kept.first[:4].tolist() == [0, 4, 7, 10]
    assert kept.by_bin[:3].tolist() == [12, 9, 9]
    assert kept.by_bin.sum() == 300
    assert kept.bins_of(np.array([3, 103, 4, 99]))[[0, 1, 31]].tolist() == [2, 1, 1]


def test_a_store_of_schema_2_is_read_without_profiles(tmp_path: Path) -> None:
    path = make_tiny_store(tmp_path)
    as_store_schema(path, 2)
    with FeatureStore.open(path) as store:
        assert store.feature(RARE).n_active == 1
        with pytest.raises(ArtefactError, match=r"older saescope .schema 2.*--replace"):
            store.token_profile(RARE)
        with pytest.raises(ArtefactError, match=r"older saescope .schema 2"):
            store.position_profile(RARE)


def test_activations_are_in_order_and_complete(features: FeatureStore) -> None:
    for number in range(D_SAE):
        position, activation = of_feature(number)
        found = features.activations(number)
        np.testing.assert_array_equal(found[0], position)
        np.testing.assert_array_equal(found[1], activation)
        np.testing.assert_array_equal(features.activations(number, 3)[0], position[:3])


def test_activations_below_one_match_numpy(features: FeatureStore) -> None:
    _, activation = of_feature(5)
    for at in (0.0, float(activation[0]), float(activation[len(activation) // 2]), 1e9):
        assert features.activations_below(5, at) == (activation < np.float32(at)).sum()
    assert features.activations_below(DEAD[0], 1.0) == 0


def test_histogram_matches_its_definition(features: FeatureStore) -> None:
    for number in range(D_SAE):
        histogram = features.histogram(number)
        _, activation = of_feature(number)
        assert histogram.edges[0] == 0
        assert histogram.counts.sum() == len(activation)
        if len(activation):
            assert histogram.edges[-1] == activation.max()
            bins = np.ceil(activation.astype(np.float64) * 40 / float(activation.max())) - 1
            np.testing.assert_array_equal(
                histogram.counts, np.bincount(bins.astype(int), minlength=40)
            )


def test_top_examples_are_the_strongest_one_a_sequence(features: FeatureStore) -> None:
    for number in range(D_SAE):
        position, activation = of_feature(number)
        wanted, seen = [], set()
        for at, value in zip(position, activation, strict=True):
            if at // CONTEXT not in seen and len(wanted) < 20:
                seen.add(at // CONTEXT)
                wanted.append((at, value))
        found = [(e.position, e.activation) for e in features.examples(number, "top")]
        assert found == wanted
    assert len(features.examples(EVERYWHERE)) == 20
    assert features.examples(DEAD[0]) == []


def test_interval_examples(features: FeatureStore) -> None:
    for number in range(D_SAE):
        position, activation = of_feature(number)
        if not len(position):
            assert features.examples(number, "interval") == []
            continue
        interval = (np.ceil(activation.astype(np.float64) * 40 / float(activation.max())) - 1) // 8
        examples = features.examples(number, "interval")
        assert [e.interval for e in examples] == sorted(e.interval for e in examples)[::-1]
        value = dict(zip(position.tolist(), activation.tolist(), strict=True))
        which = dict(zip(position.tolist(), interval.tolist(), strict=True))
        for part in range(5):
            mine = [e for e in examples if e.interval == part]
            available = np.unique(position[interval == part] // CONTEXT)
            assert len(mine) == min(5, len(available))
            assert len({e.sequence for e in mine}) == len(mine)
            assert all(which[e.position] == part for e in mine)
            assert all(value[e.position] == e.activation for e in mine)
            assert [e.rank for e in mine] == list(range(len(mine)))


def test_interval_examples_are_reproducible_and_spread(
    features: FeatureStore, tmp_path: Path
) -> None:
    with FeatureStore.open(make_tiny_store(tmp_path)) as again:
        for number in (EVERYWHERE, 0, 20):
            assert again.examples(number, "interval") == features.examples(number, "interval")
    # not just the strongest of each interval: over its range, not at its upper end
    for interval in range(5):
        mine = [e.activation for e in features.examples(EVERYWHERE, "interval")]
        width = features.feature(EVERYWHERE).max / 5
        inside = [a for a in mine if interval * width < a <= (interval + 1) * width]
        assert min(inside) < (interval + 1) * width - width / 4


@pytest.mark.parametrize("window", [None, 0, 3])
def test_windows(features: FeatureStore, window: int | None) -> None:
    dense = np.zeros((D_SAE, N_SEQUENCES * CONTEXT), dtype=np.float32)
    dense[ROWS.feature, ROWS.position] = ROWS.activation
    for number in (EVERYWHERE, 0, 5, RARE, 62):
        for kind in ("top", "interval"):
            for e in features.examples(number, kind, window):
                reach = CONTEXT if window is None else window
                first = max(e.index - reach, 0)
                last = min(e.index + reach + 1, CONTEXT)
                assert e.start == first
                assert e.token_ids == ROWS.tokens[e.sequence, first:last].tolist()
                row = dense[number].reshape(N_SEQUENCES, CONTEXT)[e.sequence]
                assert e.activations == row[first:last].tolist()
                assert e.activations[e.index - e.start] == e.activation
                document = ROWS.document[e.sequence]
                assert e.document == document[e.index]
                assert e.same_document == (document[first:last] == e.document).tolist()
                assert e.title == f"Title <{e.document}>"
                assert len(e.tokens) == len(e.token_ids)


def test_a_character_of_two_tokens_is_shown_once(features: FeatureStore) -> None:
    found = [
        e for n in range(D_SAE) for e in features.examples(n) if e.sequence == 3 and e.index < 4
    ]
    assert found
    assert found[0].tokens[4:6] == ["", "雨"], "the token that completes it shows it"
    assert features.vocabulary.text(WORDS.index(b"\xe9\x9b")) == "\\xe9\\x9b"


def test_a_window_does_not_cut_a_character(features: FeatureStore) -> None:
    found = [e for n in range(D_SAE) for e in features.examples(n, window=0)]
    (example, *_) = [e for e in found if e.sequence == 3 and e.index == 5]
    assert example.tokens == ["雨"]


def test_join_partial_loses_nothing() -> None:
    text = "naïve 雨 🌧️"
    raw = [bytes([b]) for b in text.encode()]
    assert "".join(join_partial(raw)) == text
    assert join_partial([b"\xf0\x9f", b"x", b"\xa7"]) == ["\\xf0\\x9f", "x", "\\xa7"]


def test_features_of_positions_and_sequences(features: FeatureStore) -> None:
    for position in (17, 2 * CONTEXT + 5, 39 * CONTEXT + 3):
        mine = ROWS.position == position
        order = np.lexsort((ROWS.feature[mine], -ROWS.activation[mine]))
        found = features.features_of_position(*divmod(position, CONTEXT))
        np.testing.assert_array_equal(found.feature, ROWS.feature[mine][order])
        np.testing.assert_array_equal(found.activation, ROWS.activation[mine][order])
    assert len(features.features_of_position(5, 0).feature) == 0
    mine = ROWS.position // CONTEXT == 12
    order = np.lexsort((ROWS.feature[mine], -ROWS.activation[mine], ROWS.position[mine]))
    found = features.features_of_sequence(12)
    np.testing.assert_array_equal(found.position, ROWS.position[mine][order])
    np.testing.assert_array_equal(found.feature, ROWS.feature[mine][order])
    with pytest.raises(InputError, match="no such position"):
        features.features_of_position(0, CONTEXT)


def test_coactivation_matches_correlation(features: FeatureStore) -> None:
    kept = ROWS.keep.ravel()
    fires = np.zeros((D_SAE, N_SEQUENCES * CONTEXT), dtype=bool)
    fires[ROWS.feature, ROWS.position] = True
    for number in (0, 5, RARE, 62):
        mine = fires[number, kept].astype(float)
        wanted = {}
        for other in range(D_SAE):
            theirs = fires[other, kept].astype(float)
            if other != number and theirs.std() > 0 and (mine * theirs).any():
                value = np.corrcoef(mine, theirs)[0, 1]
                if value > 0:
                    wanted[other] = value
        best = sorted(wanted, key=lambda o: (-round(wanted[o], 12), o))[:20]
        found = features.coactivating(number, 20)
        assert [c.feature for c in found] == best
        for c in found:
            assert c.correlation == pytest.approx(wanted[c.feature], rel=1e-5)
            assert c.share == pytest.approx(fires[c.feature, kept][mine > 0].mean(), rel=1e-6)
    assert features.coactivating(EVERYWHERE) == []
    assert features.coactivating(DEAD[0]) == []
    assert len(features.coactivating(0, 2)) == 2


def test_logits_and_neighbours(features: FeatureStore) -> None:
    logits = features.logits(10)
    assert [e.token_id for e in logits.top] == [10, 11, 12, 13, 14]
    assert [e.value for e in logits.top] == pytest.approx([2.0, 1.9, 1.8, 1.7, 1.6])
    assert [e.token_id for e in logits.bottom] == [19, 20, 21, 22, 23]
    assert [e.value for e in logits.bottom] == pytest.approx([-2.0, -1.9, -1.8, -1.7, -1.6])
    assert logits.top[1].token == " $x$"
    neighbours = features.neighbours(62)
    assert [(n.feature, n.cosine) for n in neighbours] == [(63, 0.75), (0, 0.5), (1, 0.25)]
    assert neighbours[1].density == features.feature(0).density


def test_top_tokens_are_the_commonest_of_the_top_examples(features: FeatureStore) -> None:
    found = features.top_tokens([EVERYWHERE, DEAD[0], 20], n=3)
    assert found[DEAD[0]] == []
    for number in (EVERYWHERE, 20):
        ids = [e.token_ids[e.index] for e in features.examples(number)]
        counts = sorted(set(ids), key=lambda t: (-ids.count(t), ids.index(t)))
        assert found[number] == [features.vocabulary.text(t) for t in counts[:3]]
    assert features.top_tokens([]) == {}


def test_paging_visits_every_feature_once_in_order(features: FeatureStore) -> None:
    density = features.densities()
    wanted = sorted(range(D_SAE), key=lambda f: (-density[f], f))
    found: list[int] = []
    for offset in range(0, D_SAE + 10, 10):
        page = features.features(sort="density", descending=True, limit=10, offset=offset)
        assert page.total == D_SAE
        found += page.rows.column("feature").to_pylist()
    assert found == wanted


def test_filters(features: FeatureStore) -> None:
    def ids(**bounds) -> list[int]:
        page = features.features(FeatureFilter(**bounds), limit=1000)
        assert page.total == len(page.rows)
        return page.rows.column("feature").to_pylist()

    density = features.densities()
    top = np.array([features.feature(f).max for f in range(D_SAE)])
    assert ids(state="dead") == sorted(DEAD)
    assert ids(state="live") == [f for f in range(D_SAE) if f not in DEAD]
    assert ids(density_min=0.1, density_max=0.2) == [
        f for f in range(D_SAE) if 0.1 <= density[f] <= 0.2
    ]
    assert ids(activation_min=9.5) == [f for f in range(D_SAE) if top[f] >= 9.5]
    assert ids(activation_max=5.0, state="live") == [
        f for f in range(D_SAE) if top[f] <= 5 and f not in DEAD
    ]
    assert ids(feature_min=5, feature_max=8) == [5, 6, 7, 8]
    assert ids(ids=(9, 2, 500)) == [2, 9]
    assert ids(ids=()) == []
    with pytest.raises(InputError, match="state"):
        features.features(FeatureFilter(state="asleep"))


@pytest.mark.parametrize("sort", ["nothing", "feature; DROP TABLE x", 'a"b', "first_row"])
def test_sort_columns_are_checked(features: FeatureStore, sort: str) -> None:
    with pytest.raises(InputError, match="sort"):
        features.features(sort=sort)


def test_wrong_numbers_are_clear_errors(features: FeatureStore) -> None:
    for query in (features.feature, features.examples, features.histogram, features.logits):
        for wrong in (-1, D_SAE, 10**9):
            with pytest.raises(InputError, match="no such feature"):
                query(wrong)
    with pytest.raises(InputError, match="kind"):
        features.examples(0, "best")
    with pytest.raises(InputError, match="window"):
        features.examples(0, window=-1)
    with pytest.raises(InputError, match="limit"):
        features.features(limit=0)


def test_next_previous_random(features: FeatureStore) -> None:
    assert features.next_live(6) == 8
    assert features.previous_live(8) == 6
    assert features.next_live(62) is None
    assert features.previous_live(0) is None
    live = {features.random_live(seed) for seed in range(300)}
    assert live <= set(range(D_SAE)) - set(DEAD)
    assert len(live) > 40


def test_overview(features: FeatureStore, path: Path) -> None:
    overview = features.overview()
    assert (overview.name, overview.model) == ("tiny", "tiny-llama")
    assert (overview.n_live, overview.n_dead) == (D_SAE - 3, 3)
    assert overview.n_activations == len(ROWS.position)
    assert overview.n_kept == ROWS.keep.sum()
    assert overview.n_tokens == ROWS.tokens.size
    assert overview.n_documents == N_DOCUMENTS
    assert overview.mean_active == pytest.approx(len(ROWS.position) / ROWS.keep.sum())
    assert overview.metrics == META["metrics"]
    assert overview.bytes == path.stat().st_size
    assert features.meta["split_kept"] == {
        "train": int(ROWS.keep[:36].sum()),
        "held_out": int(ROWS.keep[36:].sum()),
    }


def test_many_threads_get_the_right_rows(features: FeatureStore) -> None:
    wanted = {f: features.examples(f, "top", 4) for f in range(0, D_SAE, 4)}
    wrong: list[object] = []

    def read(start: int) -> None:
        try:
            for step in range(40):
                number = 4 * ((start + step) % len(wanted))
                if features.examples(number, "top", 4) != wanted[number]:
                    wrong.append(number)
                position, _ = features.activations(number)
                if not np.array_equal(position, of_feature(number)[0]):
                    wrong.append(number)
        except Exception as error:  # collected: an error in a thread would not fail the test
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_replaced_store_is_seen_by_new_readers_only(tmp_path: Path) -> None:
    path = make_tiny_store(tmp_path)
    with FeatureStore.open(path) as old:
        before = old.activations(0)[1]
        make_tiny_store(tmp_path, seed=1)
        with FeatureStore.open(path.parent) as new:
            after = new.activations(0)[1]
        np.testing.assert_array_equal(old.activations(0)[1], before)
    np.testing.assert_array_equal(after, of_feature(0, make_rows(1))[1])


def test_the_file_is_opened_read_only(path: Path, features: FeatureStore) -> None:
    with pytest.raises(duckdb.InvalidInputException, match="read-only"):
        features._rows("DELETE FROM db.feature")
    before = path.read_bytes()
    features.examples(0)
    assert path.read_bytes() == before


def test_files_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no feature store here"):
        FeatureStore.open(tmp_path / "nothing")
    with pytest.raises(ArtefactError, match="no feature store here"):
        FeatureStore.open(tmp_path)
    junk = tmp_path / "junk.duckdb"
    junk.write_bytes(b"hello" * 10_000)
    with pytest.raises(ArtefactError, match="cannot be read"):
        FeatureStore.open(junk)
    other = tmp_path / "other.duckdb"
    with duckdb.connect(str(other)) as con:
        con.execute("CREATE TABLE t AS SELECT 1")
    with pytest.raises(ArtefactError, match="not a feature store"):
        FeatureStore.open(other)
    lite = tmp_path / "lite.duckdb"
    con = sqlite3.connect(lite)
    con.execute("CREATE TABLE meta (key, value)")
    con.close()
    with pytest.raises(ArtefactError):
        FeatureStore.open(lite)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", "6", "newer saescope .schema 6, this one reads up to 5"),
        ("schema", "1", r"older saescope .schema 1, this one reads 2 to 5.*--replace"),
        ("schema", '"x"', "schema version"),
        ("kind", '"harvest"', "wrong kind"),
        ("kind", "{", "cannot be read"),
    ],
)
def test_newer_or_foreign_files(tmp_path: Path, key: str, value: str, message: str) -> None:
    path = make_tiny_store(tmp_path)
    with duckdb.connect(str(path)) as con:
        con.execute("UPDATE meta SET value = ? WHERE key = ?", [value, key])
    with pytest.raises(ArtefactError, match=message):
        FeatureStore.open(path)


def test_a_truncated_store_is_an_error(tmp_path: Path) -> None:
    path = make_tiny_store(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ArtefactError, match="cannot be read"):
        FeatureStore.open(path)


def test_store_imports_without_torch() -> None:
    import subprocess
    import sys

    check = (
        "import sys, store; assert not {'torch', 'transformers', 'streamlit'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
