"""Features that differ between two groups of documents."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from saescope.__main__ import main
from saescope.errors import InputError
from store import FeatureStore, StoreWriter
from store.diff import diff, documents_of_feature
from store.document_groups import read_documents, select_documents
from tests.diff_store import DOCUMENTS, SHIFTED, TOPIC, make_topic_store
from tests.older_stores import as_store_schema
from tests.tiny_store import CONTEXT, D_SAE, N_DOCUMENTS, make_rows, make_tiny_store


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_topic_store(tmp_path_factory.mktemp("diff"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("tiny"))


def test_documents_and_where_they_lie(tiny: Path) -> None:
    rows = make_rows()
    with FeatureStore.open(tiny) as store:
        documents = read_documents(store)
    assert documents.number.tolist() == list(range(N_DOCUMENTS))
    assert documents.title[3] == "Title <3>"
    assert documents.split.tolist() == [0] * (N_DOCUMENTS - 1) + [1]
    kept = np.bincount(rows.document[rows.keep], minlength=N_DOCUMENTS)
    assert documents.kept.tolist() == kept.tolist()
    flat = np.where(rows.keep, rows.document, -1).ravel()
    positions = np.array([0, 5, 17, 40 * CONTEXT - 2])
    assert documents.at(positions).tolist() == flat[positions].tolist()


def test_groups_by_hand(tiny: Path) -> None:
    with FeatureStore.open(tiny) as store:
        documents = read_documents(store)

    def chosen(group: str) -> list[int]:
        return np.flatnonzero(select_documents(documents, group, "a")).tolist()

    assert chosen("title:Title <3>") == [3]
    assert chosen("title:title <1?>") == list(range(10, 20))
    assert chosen("key:doc-2 | doc-[45]") == [2, 4, 5]
    assert chosen("split:held_out") == [24]
    assert chosen("all") == list(range(25))
    for wrong in ("", "river", "title:", "split:test", "Split:train", "rest"):
        with pytest.raises(InputError, match=r"a: no group of documents.*allowed: title:PATTERN"):
            chosen(wrong)
    for empty in ("title:none", "title:|", "key:*<*"):
        with pytest.raises(InputError, match="a: no document is in this group"):
            chosen(empty)


def test_numbers_are_those_of_the_rows(tiny: Path) -> None:
    rows = make_rows()
    with FeatureStore.open(tiny) as store:
        found = diff(store, "key:doc-?", "key:doc-2?", permutations=99, min_documents=1)
    flat = rows.document.ravel()
    of = flat[rows.position]
    groups = {"a": list(range(10)), "b": list(range(20, 25))}
    table = found.rows.to_pandas().set_index("feature")
    assert len(table) > 50
    for name, facts in (("a", found.a), ("b", found.b)):
        inside = np.isin(flat, groups[name]) & rows.keep.ravel()
        assert facts.positions == inside.sum()
        assert facts.documents == len(groups[name])
        fires = np.isin(of, groups[name])
        counts = np.bincount(rows.feature[fires], minlength=D_SAE)
        for feature, row in table.iterrows():
            here = fires & (rows.feature == feature)
            assert row[f"positions_{name}"] == counts[feature]
            assert row[f"documents_{name}"] == len(set(of[here]))
            assert row[f"density_{name}"] == pytest.approx(counts[feature] / facts.positions)
    row = table.loc[3]
    assert row.difference == row.density_a - row.density_b == 0, "feature 3 fires everywhere"
    shares = [(table[f"positions_{n}"] + 0.5) / (g.positions + 1)
              for n, g in (("a", found.a), ("b", found.b))]  # fmt: skip
    np.testing.assert_allclose(table["log2_ratio"], np.log2(shares[0] / shares[1]), atol=1e-12)
    fires = np.isin(of, [*groups["a"], *groups["b"]])
    assert set(table.index) == set(rows.feature[fires]), "those that fire in either"
    assert (table["p"].diff().dropna() >= 0).all(), "surest first"


def test_a_planted_topic_is_found(path: Path) -> None:
    """Precision and recall: the ten features that fire four times as often, of eighty."""
    with FeatureStore.open(path) as store:
        found = diff(store, "title:river*", fdr=0.05)
    chosen = found.differing["feature"].to_pylist()
    true = set(chosen) & set(SHIFTED)
    assert len(true) == len(SHIFTED), "recall 1"
    assert len(true) / len(chosen) >= 0.9, "precision"
    assert (found.a.documents, found.b.documents) == (TOPIC, DOCUMENTS - TOPIC)
    assert set(chosen[:10]) == set(SHIFTED)
    rows = found.differing.slice(0, 10)
    assert (rows["difference"].to_numpy() > 0).all()
    assert 1.2 < np.median(rows["log2_ratio"].to_numpy()) < 2.8, "four times: 2"
    assert found.tested == 80
    assert found.undecided == 0


def test_a_planted_topic_is_found_by_its_topic(path: Path) -> None:
    """By the documents' topics the groups are what their titles say, but for those without one."""
    with FeatureStore.open(path) as store:
        found = diff(store, "topic:rivers", "topic:Towns")
        assert diff(store, "topic:R*").rows.equals(diff(store, "title:river*").rows)
    assert (found.a.documents, found.b.documents) == (TOPIC, DOCUMENTS - TOPIC - 10)
    chosen = set(found.differing["feature"].to_pylist())
    assert set(SHIFTED) <= chosen, "recall 1"
    assert len(chosen) <= 11, "precision"
    rows = found.differing.to_pandas().set_index("feature").loc[list(SHIFTED)]
    assert (rows["difference"] > 0).all()


def test_groups_by_topic_and_source(path: Path, tmp_path: Path) -> None:
    with FeatureStore.open(path) as store:
        documents = read_documents(store)

    def chosen(group: str) -> list[int]:
        return np.flatnonzero(select_documents(documents, group, "a")).tolist()

    assert chosen("topic:Rivers") == list(range(TOPIC))
    assert chosen("topic:towns") == list(range(TOPIC, DOCUMENTS - 10))
    assert chosen("topic:river? | t*") == list(range(DOCUMENTS - 10))
    assert chosen("source:source1?x") == list(range(1, DOCUMENTS, 3))
    for wrong in ("topic:", "topic:Sea", "topic:|"):
        with pytest.raises(InputError, match=r"a: no such topic.*allowed: Rivers, Towns"):
            chosen(wrong)
    without = replace(documents, groups={})
    with pytest.raises(InputError, match="not of several sources that it knows"):
        select_documents(without, "source:x", "a")
    old = shutil.copy(path, tmp_path / "old.duckdb")
    as_store_schema(Path(old), 3)
    with FeatureStore.open(old) as store, pytest.raises(InputError, match="--replace` builds it"):
        diff(store, "topic:Rivers")


def test_random_splits_stay_below_the_nominal_rate(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the groups are random every discovery is false: at most fdr of the splits have any."""
    rng, any_found = np.random.default_rng(0), 0
    splits = 60
    with FeatureStore.open(path) as store:
        documents = read_documents(store)
        monkeypatch.setattr("store.diff.read_documents", lambda _: documents)
        for seed in range(splits):
            numbers = rng.permutation(DOCUMENTS)[:TOPIC]
            group = "key:" + "|".join(f"source?/{n}" for n in numbers)
            found = diff(store, group, permutations=1999, fdr=0.1, seed=seed)
            any_found += len(found.differing) > 0
    # binomial(60, 0.1) is above 12 with probability 0.5 %
    assert any_found <= 12


def test_the_same_seed_gives_the_same_numbers(path: Path) -> None:
    with FeatureStore.open(path) as store:
        one, two, three = (
            diff(store, "split:held_out", permutations=200, seed=s) for s in (1, 1, 2)
        )
    assert one.rows.equals(two.rows)
    assert not one.rows.equals(three.rows)


def test_blocks_do_not_change_the_numbers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeatureStore.open(path) as store:
        whole = diff(store, "title:river*", permutations=300)
        monkeypatch.setattr("store.diff._ROWS", 500)
        assert diff(store, "title:river*", permutations=300).rows.equals(whole.rows)
        monkeypatch.setattr("store.diff._CELLS", 1)
        assert diff(store, "title:river*", permutations=300).rows.equals(whole.rows)


def test_two_stores_of_one_sae(path: Path, tmp_path: Path) -> None:
    plain = make_topic_store(tmp_path, seed=5, shifted=False, name="plain")
    foreign = make_topic_store(tmp_path, seed=5, name="foreign", sae_hash="another")
    with (
        FeatureStore.open(path) as a,
        FeatureStore.open(plain) as b,
        FeatureStore.open(foreign) as c,
    ):
        found = diff(a, "title:river*", other=b)
        assert (found.a.documents, found.b.documents) == (TOPIC, DOCUMENTS)
        assert set(SHIFTED) <= set(found.differing["feature"].to_pylist())
        swapped = diff(b, "all", "title:river*", other=a)
        left = found.rows.to_pandas().set_index("feature")
        right = swapped.rows.to_pandas().set_index("feature").loc[left.index]
        np.testing.assert_allclose(left["difference"], -right["difference"])
        with pytest.raises(InputError, match="is the store of another SAE"):
            diff(a, "all", other=c)


def test_features_in_few_documents_are_not_tested(path: Path) -> None:
    with FeatureStore.open(path) as store:
        found = diff(store, "split:held_out", permutations=50, min_documents=40)
    table = found.rows.to_pandas()
    enough = table["documents_a"] + table["documents_b"] >= 40
    assert found.tested == enough.sum() < len(table)
    assert table.loc[~enough, ["p", "q"]].isna().all().all()
    assert table.loc[enough, ["p", "q"]].notna().all().all()


def test_too_few_permutations_are_said(path: Path) -> None:
    with FeatureStore.open(path) as store:
        found = diff(store, "title:river*", permutations=60, fdr=0.01)
    assert len(found.differing) == 0
    assert found.undecided >= len(SHIFTED)


def test_wrong_groups(path: Path) -> None:
    with FeatureStore.open(path) as store:
        for a, b, message in (
            ("title:*<1>", "rest", "a: the documents of a group are what is exchanged"),
            ("all", "rest", "b: the documents of a group.*given: 0; allowed: at least 2"),
            ("title:river*", "split:train", "b: a document can be in one group only.*shares 30"),
            ("title:river*", "x", "b: no group of documents"),
        ):
            with pytest.raises(InputError, match=message):
                diff(store, a, b)
        wrong: dict[str, Any] = {"permutations": 0, "fdr": 1.0, "min_documents": 0, "seed": -1}
        for name, value in wrong.items():
            with pytest.raises(InputError, match=name):
                diff(store, "title:river*", **{name: value})


def test_documents_of_a_feature(tiny: Path) -> None:
    rows = make_rows()
    of = rows.document.ravel()[rows.position]
    with FeatureStore.open(tiny) as store:
        found = documents_of_feature(store, 5, "rest", outside="key:doc-1*", n=4).to_pylist()
        assert documents_of_feature(store, 7, "all").num_rows == 0, "a dead feature"
    mine = (rows.feature == 5) & ~np.isin(of, [1, *range(10, 20)])
    numbers, counts = np.unique(of[mine], return_counts=True)
    kept = np.bincount(rows.document[rows.keep], minlength=N_DOCUMENTS)
    wanted = sorted(zip(-counts, -counts / kept[numbers], numbers, strict=True))[:4]
    assert [(row["positions"], row["document"]) for row in found] == [(-c, n) for c, _, n in wanted]
    for row in found:
        here = mine & (of == row["document"])
        assert row["strongest"] == rows.activation[here].max()
        at = rows.position == row["position"]
        assert rows.activation[here & at].tolist() == [row["strongest"]]
        assert row["share"] == row["positions"] / row["kept"]
        assert row["title"] == f"Title <{row['document']}>"


def test_a_position_in_no_document_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "features.duckdb"
    with StoreWriter(path, meta={}, d_sae=2, context=3, threads=1) as writer:
        writer.add_vocabulary(["a"])
        document = np.array([[0, 0, -1], [1, 1, 1], [2, 2, 2], [3, 3, 3]])
        keep = np.array([[False, True, True]] * 4)
        # sequences have numbers 4 to 7
        writer.add_sequences(4, np.zeros((4, 3), int), document, keep, np.zeros(4, np.int8))
        names = [f"d{n}" for n in range(4)]
        writer.add_documents(
            pa.table({"document": range(4), "key": names, "title": names, "split": [0] * 4})
        )
        position = np.array([13, 14, 16, 22])
        writer.add_activations(position, np.array([0, 0, 0, 1]), np.ones(4))
        writer.finish()
    with FeatureStore.open(path) as store:
        found = diff(store, "key:d0|d1", permutations=20, min_documents=1)
    assert (found.a.positions, found.b.positions) == (3, 4)
    table = found.rows.to_pandas().set_index("feature")
    assert table.loc[0, "positions_a"] == 2, "the one in no document is not counted"
    assert table.loc[1, "density_b"] == 0.25


def test_the_command(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["diff", str(path.parent), "--a", "title:river*", "--top", "3"]
    assert main([*words, "--out", str(tmp_path / "x.parquet")]) == 0
    said = capsys.readouterr().out
    assert "a  title:river*: 30 documents, 930 positions" in said
    assert "b  rest: 60 documents, 1,860 positions" in said
    assert "features differ (q ≤ 0.05)" in said
    assert "10,000 permutations of documents, seed 0" in said
    assert len([line for line in said.splitlines() if "%" in line]) == 3
    table = parquet.read_table(tmp_path / "x.parquet")
    with FeatureStore.open(path) as store:
        assert table.equals(diff(store, "title:river*").rows)
    assert main([*words, "--out", str(tmp_path / "x.csv")]) == 0
    assert csv.read_csv(tmp_path / "x.csv").num_rows == table.num_rows
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "x.csv")]) == 2
    assert "holds something, which is never replaced" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--out", "x.txt"])
    assert "out: no kind of table" in capsys.readouterr().err
    assert main(["diff", str(path), "--a", "title:none*"]) == 2
    assert "no document is in this group (given: 'title:none*')" in capsys.readouterr().err
