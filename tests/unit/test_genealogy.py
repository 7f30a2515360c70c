"""Features followed back through versions: planted times of birth, splits, merges, and nulls."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pyarrow import parquet
from scipy.sparse import csr_array

import sae
from sae.training.snapshots import find_snapshots
from saescope.__main__ import main
from saescope.errors import InputError
from saescope.paths import AnyPath
from store.genealogy import genealogy_of_codes, genealogy_of_directions
from tests.unit.test_train_rows import SETTINGS, X

D, FEATURES, VERSIONS = 64, 40, 5


def random(n: int, seed: int, d: int = D) -> NDArray[np.float64]:
    found = np.random.default_rng(seed).standard_normal((n, d))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def planted() -> tuple[list[NDArray[np.float64]], NDArray[np.int64], list[NDArray[np.int64]]]:
    """Versions whose features come to their last direction at known times, in other orders.

    Before, they are random ones; after, at a cosine of 0.8 to 1 of the last.
    """
    rng = np.random.default_rng(0)
    final, noise = random(FEATURES, 1), random(FEATURES, 2)
    born = rng.integers(0, VERSIONS + 1, FEATURES)
    versions, orders = [], []
    for version in range(VERSIONS):
        mixed = final + 0.5 * (VERSIONS - version) / VERSIONS * noise
        made = np.where((version >= born)[:, None], mixed, random(FEATURES, 10 + version))
        order = rng.permutation(FEATURES)
        versions.append(made[order])
        orders.append(order)
    return [*versions, final], born, orders


def names(n: int = VERSIONS) -> list[str]:
    return [f"v{number}" for number in range(n)]


def test_times_of_birth_are_recovered() -> None:
    versions, born, orders = planted()
    found = genealogy_of_directions(versions, names())
    assert (found.emerged() == born).all()
    assert (found.emerged(one_to_one=True) == born).all()
    assert found.share.tolist() == [(born <= version).mean() for version in range(VERSIONS)]
    assert found.null_share.tolist() == [0] * VERSIONS
    for version in range(VERSIONS):
        there = born <= version
        assert (orders[version][found.nearest[version]] == np.arange(FEATURES))[there].all()
        assert found.partner is not None
        assert (found.partner[version][~there] == -1).all()
    quick = genealogy_of_directions(versions, names(), match=False)
    np.testing.assert_allclose(quick.similarity, found.similarity, atol=1e-6)
    assert (quick.nearest == found.nearest).all()
    with pytest.raises(InputError, match="not matched"):
        quick.emerged(one_to_one=True)


def test_what_goes_and_comes_back_emerged_when_it_came_to_stay() -> None:
    axes = np.eye(4)
    found = genealogy_of_directions([axes[[0]], axes[[1]], axes[[0]], axes[[0]]], names(3))
    assert found.similarity[:, 0].tolist() == [1, 0, 1]
    assert found.emerged().tolist() == [2]
    only_last = genealogy_of_directions([axes[[1]], axes[[0]]], names(1))
    assert only_last.emerged().tolist() == [1]


def test_splits_and_merges_by_hand() -> None:
    axes = np.eye(8)
    one = axes[[0, 1, 2]]
    # feature 0 becomes two; 1 stays; 2 stays
    two = np.stack([axes[1], axes[0] + 0.5 * axes[5], axes[0] - 0.5 * axes[5], axes[2]])
    # 1 and 2 of it become one again
    three = np.stack([axes[0], axes[1], axes[2]])
    found = genealogy_of_directions([one, two, three], names(2))
    assert found.events is not None
    assert found.events.to_pylist() == [
        {"kind": "split", "version": 1, "feature": 0, "others": "1 2"},
        {"kind": "merge", "version": 2, "feature": 0, "others": "1 2"},
    ]
    assert found.emerged().tolist() == [0, 0, 0]


def test_by_activations_on_the_same_positions() -> None:
    rng = np.random.default_rng(3)
    final = np.where(rng.random((2000, 6)) < 0.05, rng.random((2000, 6)) + 0.5, 0)
    early = np.where(rng.random((2000, 6)) < 0.05, rng.random((2000, 6)) + 0.5, 0)
    early[:, [5, 4]] = 3 * final[:, [0, 1]]
    found = genealogy_of_codes([csr_array(early), csr_array(final)], ["early"])
    assert found.emerged().tolist() == [0, 0, 1, 1, 1, 1]
    assert found.nearest[0, :2].tolist() == [5, 4]
    np.testing.assert_allclose(found.similarity[0, :2], 1, atol=1e-6)
    wanted = np.corrcoef(final.T, early.T)[:6, 6:].max(1)
    np.testing.assert_allclose(found.similarity[0], wanted, atol=1e-6)
    assert found.null.max() < 0.2
    with pytest.raises(InputError, match="not of the same positions"):
        genealogy_of_codes([csr_array(early[1:]), csr_array(final)], ["early"])


def test_the_null_of_an_untrained_decoder() -> None:
    """Random directions are to the versions what those of an untrained SAE are."""
    trained, untrained = random(300, 5, 8), random(300, 6, 8)
    found = genealogy_of_directions([untrained, trained], ["untrained"], threshold=0.9)
    assert found.null.mean() == pytest.approx(found.similarity.mean(), abs=0.02)
    assert found.null_share[0] == pytest.approx(found.share[0], abs=0.1)
    assert 0 < found.share[0] < 1


def test_the_table_has_a_row_a_feature_and_version() -> None:
    versions, born, _ = planted()
    table = genealogy_of_directions(versions, names()).table().to_pandas()
    assert len(table) == FEATURES * VERSIONS
    assert (table[table["version"] == 3]["emerged"].to_numpy() == born).all()
    assert set(table[table["version"] == 3]["name"]) == {"v3"}
    assert (table["partner"].notna() == (table["similarity"] >= 0.7)).all()


def test_what_cannot_be_followed() -> None:
    with pytest.raises(InputError, match="one version of it or more"):
        genealogy_of_directions([np.eye(3)], [])
    with pytest.raises(InputError, match="one name a version"):
        genealogy_of_directions([np.eye(3), np.eye(3)], ["a", "b"])
    with pytest.raises(InputError, match="different widths"):
        genealogy_of_directions([np.eye(3), np.eye(4)], ["a"])
    with pytest.raises(InputError, match="threshold: out of range"):
        genealogy_of_directions([np.eye(3), np.eye(3)], ["a"], threshold=0)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    sae.train(X, "topk", k=3, **{**SETTINGS, "passes": 12}, lr=3e-3, snapshots=5, out=folder)
    return folder


def test_a_run_is_followed_through_its_snapshots(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, events = tmp_path / "features.parquet", tmp_path / "events.csv"
    words = ["compare", str(run), "--threshold", "0.8"]
    assert main([*words, "--out", str(out), "--events", str(events)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "24 features followed through 5 versions; found from a similarity of 0.8 on" in said[0]
    kept = find_snapshots(run)
    cosine = np.stack([cosines(each.path, run) for each in kept]).max(2)
    table = parquet.read_table(out).to_pandas()
    np.testing.assert_allclose(table["similarity"], cosine.ravel(), atol=1e-5)
    for version, each in enumerate(kept):
        line = said[2 + version].split()
        assert line[:2] == [f"{each.tokens:,}", "tokens"]
        assert line[2] == f"{(cosine[version] >= 0.8).mean():.1%}"
        assert line[5] == str((table[table["version"] == version]["emerged"] == version).sum())
    assert events.read_text().startswith('"kind","version","feature","others"')
    assert main([*words, "--out", str(out)]) == 2
    assert "never replaced" in capsys.readouterr().err


def cosines(a: AnyPath, b: Path) -> NDArray[np.float64]:
    """Of all decoder rows of b with all of a."""
    rows = [sae.load(each).W_dec.detach().numpy().astype(np.float64) for each in (b, a)]
    one, two = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in rows)
    return one @ two.T


def test_versions_that_are_named_and_what_does_not_go_together(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = find_snapshots(run)[0].path, find_snapshots(run)[-1].path
    assert main(["compare", str(run), "--versions", str(first), str(last)]) == 0
    assert "through 2 versions" in capsys.readouterr().out
    for words, message in (
        ([str(first)], "kept no snapshots"),
        ([str(run), str(first), "--versions", str(last)], "leave run_b out"),
        ([str(run), str(first), "--events", "x.csv"], "leave run_b out"),
        ([str(run), "--events", "x.txt"], "no kind of table"),
        ([str(run), "--site-b", "x"], "run_b, which is not given"),
        ([str(run), "--by", "activations"], "names no harvest"),
    ):
        try:
            code = main(["compare", *words])
        except SystemExit as stopped:  # of options that do not go together
            code = stopped.code
        assert code == 2
        assert message in " ".join(capsys.readouterr().err.split())
