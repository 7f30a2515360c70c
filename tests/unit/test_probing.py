"""Sparse probing: fits, selection and scores against references; a world whose answer is known."""

import numpy as np
import pytest
from scipy import optimize, sparse

from sae.probing.config import ProbingConfig
from sae.probing.divisions import Division, divisions
from sae.probing.logistic import STRENGTHS, fit, folds_of, minimise
from sae.probing.scores import accuracy, auc, majority, mean_and_interval
from sae.probing.selection import standardised_mean_difference, strongest
from sae.probing.suite import probe_division
from saescope.errors import InputError


def wave(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Columns and labels that need no random numbers."""
    i = np.arange(count)
    x = np.stack([np.sin(1.3 * i), np.cos(0.7 * i) * (1 + i / 20), ((i * 7) % 11) / 5.0], 1)
    y = np.sin(1.3 * i) + 0.5 * np.cos(0.7 * i) + 0.8 * np.sin(3.1 * i) > 0.1
    return x, y


# scikit-learn 1.9.1, LogisticRegression(C=C, tol=1e-12).fit on the standardised columns of `wave`
BY_SCIKIT_LEARN = {
    0.01: [0.1146095606183572, 0.052093837035198674, 0.002014599741083442, 0.10047110195136269],
    1.0: [1.4938744666098205, 0.7389598447231974, -0.06570789132592574, 0.12695584848872157],
    100.0: [1.9912966442817748, 1.054433918394751, -0.107972575082136, 0.13029225396380434],
}


@pytest.mark.parametrize("strength", BY_SCIKIT_LEARN)
def test_a_fit_is_scikit_learns(strength: float) -> None:
    x, y = wave()
    standard = (x - x.mean(0)) / x.std(0)
    found = minimise(standard, y, np.ones((1, len(y))), strength)[0]
    np.testing.assert_allclose(found, BY_SCIKIT_LEARN[strength], atol=2e-6)


def test_many_columns_are_fitted_as_few_are() -> None:
    """The iterative steps on rotated columns end at the minimum of the objective, too."""
    draw = np.random.default_rng(3)
    x = draw.normal(size=(50, 90))
    y = x[:, 0] + draw.normal(size=50) > 0
    probe = fit(x, y, seed=0)
    standard = (x - x.mean(0)) / x.std(0)
    sign = np.where(y, 1.0, -1.0)

    def gradient(theta: np.ndarray) -> np.ndarray:
        wrong = -sign / (1 + np.exp(sign * (standard @ theta[:-1] + theta[-1])))
        return np.append(
            theta[:-1] + probe.strength * wrong @ standard, probe.strength * wrong.sum()
        )

    assert np.abs(gradient(np.append(probe.weight, probe.bias))).max() < 1e-5
    np.testing.assert_allclose(probe.score(x), standard @ probe.weight + probe.bias)


def test_the_penalty_has_the_least_loss_on_rows_left_out() -> None:
    """By a search that shares no code: scipy's minimiser, fold by fold, for each C."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(60, 4))
    y = x[:, 0] + 1.5 * draw.normal(size=60) > 0
    standard, fold = (x - x.mean(0)) / x.std(0), folds_of(y, seed=5)
    sign = np.where(y, 1.0, -1.0)

    def left_out(strength: float) -> float:
        total = 0.0
        for each in range(5):
            own = fold != each

            def objective(theta: np.ndarray, own: np.ndarray = own) -> float:
                score = standard[own] @ theta[:-1] + theta[-1]
                penalty = 0.5 * theta[:-1] @ theta[:-1]
                return float(penalty + strength * np.logaddexp(0, -sign[own] * score).sum())

            best = optimize.minimize(objective, np.zeros(5), method="BFGS").x
            score = standard[~own] @ best[:-1] + best[-1]
            total += float(np.logaddexp(0, -sign[~own] * score).sum())
        return total

    assert fit(x, y, seed=5).strength == min(STRENGTHS, key=left_out)


def test_folds_hold_as_many_of_each_label() -> None:
    y = np.arange(40) < 10
    fold = folds_of(y, seed=0)
    assert np.bincount(fold[y]).tolist() == [2] * 5
    assert np.bincount(fold[~y]).tolist() == [6] * 5


def test_smd_by_hand() -> None:
    """With the label 1, 3, 5: mean 3, variance 4. Without 0, 1, 2, 1: mean 1, variance 2/3."""
    x = np.array([[1.0], [3.0], [5.0], [0.0], [1.0], [2.0], [1.0]])
    y = np.arange(7) < 3
    wanted = (3 - 1) / np.sqrt((4 + 2 / 3) / 2)
    for features in (x, sparse.csr_array(x)):
        assert standardised_mean_difference(features, y)[0] == pytest.approx(wanted, rel=1e-14)


def test_smd_where_a_feature_does_not_vary() -> None:
    label = np.arange(6) < 3
    x = np.stack([np.full(6, 0.1), np.where(label, 2.0, 0.0), np.zeros(6), [1, 0, 1, 0, 1, 0]], 1)
    for features in (x, sparse.csr_array(x)):
        found = standardised_mean_difference(features, label)
        assert found[:3].tolist() == [0.0, np.inf, 0.0]
        assert strongest(found, 2).tolist() == [1, 3]


def test_auc_by_hand() -> None:
    """Pairs (positive, negative): 2 > 1, 2 > 0, 1 = 1, 1 > 0."""
    assert auc(np.array([2.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False])) == 3.5 / 4
    assert accuracy(np.array([2.0, -1.0, 1.0, 0.0]), np.array([True, True, False, False])) == 0.5
    assert majority(np.array([True, False, False, False])) == 0.75
    with pytest.raises(InputError, match="all labels are equal"):
        auc(np.zeros(3), np.ones(3, np.bool_))


def test_interval_by_hand() -> None:
    mean, half = mean_and_interval([0.8, 0.9, 1.0])
    assert mean == pytest.approx(0.9)
    assert half == pytest.approx(4.302652729 * 0.1 / np.sqrt(3))


# ---- a world whose answer is known ---------------------------------------------------------------


def world(texts: int = 400, planted: int = 7) -> tuple[dict, np.ndarray, Division]:
    """Features of chance, sparse, of which one is the label; activations of chance."""
    draw = np.random.default_rng(0)
    y = draw.random(texts) < 0.5
    values = draw.random((texts, 50)) * (draw.random((texts, 50)) < 0.2)
    noise = sparse.csr_array(values)
    values = values.copy()
    values[:, planted] = y * draw.uniform(1, 2, texts)
    by_method = {
        "sae": sparse.csr_array(values),
        "untrained": noise,
        "raw": draw.normal(size=(texts, 12)),
    }
    train, test = np.arange(0, texts // 2), np.arange(texts // 2, texts)
    return by_method, y, Division(train=train, tests={"normal": test})


def test_a_planted_feature_is_found_and_chance_is_chance() -> None:
    by_method, y, division = world()
    rows = list(probe_division(by_method, y, division, (1, 2), seed=0))
    found = {(row["method"], row["k"]): row for row in rows}
    assert found["sae", 1]["features"] == [7]
    assert found["sae", 1]["auc"] == 1.0
    assert found["sae", 1]["accuracy"] == 1.0
    for method in ("untrained", "pca", "neurons"):
        assert abs(found[method, 1]["auc"] - 0.5) < 0.12
    assert abs(found["raw", 12]["auc"] - 0.5) < 0.12
    assert {method for method, _ in found} == {
        "sae",
        "untrained",
        "random",
        "pca",
        "neurons",
        "raw",
    }


def test_nothing_of_a_probe_depends_on_test_labels() -> None:
    """A feature that tells the label of test texts alone is not chosen, and labels of test texts
    change no choice: not the features, not C, and no score but by being compared with it."""
    by_method, y, division = world()
    values = by_method["sae"].toarray()
    test = division.tests["normal"]
    values[:, 7] = 0
    values[test, 7] = np.where(y[test], 9.0, 0.0)  # right on the test, silent in training
    by_method["sae"] = sparse.csr_array(values)
    rows = list(probe_division(by_method, y, division, (1, 2), seed=0))
    assert all(7 not in row["features"] for row in rows if row["method"] == "sae")
    turned = y.copy()
    turned[test] = ~turned[test]
    for one, other in zip(
        rows, probe_division(by_method, turned, division, (1, 2), seed=0), strict=True
    ):
        assert (one["features"], one["strength"]) == (other["features"], other["strength"])
        assert one["auc"] == pytest.approx(1 - other["auc"], abs=1e-12)


def test_divisions_share_no_text_and_keep_their_shares() -> None:
    y = np.arange(1000) < 400
    elsewhere = np.arange(20) < 10
    found = list(divisions(y, elsewhere, seed=1, scarce=(16, 64), imbalance=0.1))
    by_setting = {name: (each.train, test) for each in found for name, test in each.tests.items()}
    assert list(by_setting) == ["normal", "ood", "scarce-16", "scarce-64", "imbalanced"]
    train, test = by_setting["normal"]
    assert (len(train), len(test), y[test].sum()) == (700, 300, 120)
    for name, (own, other) in by_setting.items():
        assert not set(own) & set(other)
        assert set(own) <= set(train), name
    assert by_setting["ood"][1].tolist() == list(range(1000, 1020))
    few, same = by_setting["scarce-16"]
    assert (len(few), y[few].sum(), same.tolist()) == (16, 6, test.tolist())
    thin, thin_test = by_setting["imbalanced"]
    assert y[thin].mean() == pytest.approx(0.1, abs=0.002)
    assert y[thin_test].mean() == pytest.approx(0.1, abs=0.005)


def test_settings_without_texts_enough_are_left_out() -> None:
    few = np.array([True, False, False, False, False, False])
    assert list(divisions(few, few[:0], seed=0, scarce=(4,), imbalance=0.1)) == []
    rare = np.arange(100) < 8
    found = list(divisions(rare, rare[:0], seed=0, scarce=(90,), imbalance=0.1))
    assert [list(each.tests) for each in found] == [["normal"]]


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"ks": (0,)}, "probing.ks"),
        ({"ks": (1, 1)}, "probing.ks"),
        ({"seeds": 0}, "probing.seeds"),
        ({"imbalance": 0.5}, "probing.imbalance"),
        ({"sets": ()}, "probing.sets"),
        ({"scarce": (2,)}, "probing.scarce"),
    ],
)
def test_settings_that_cannot_be(given: dict, where: str) -> None:
    with pytest.raises(InputError, match=where):
        ProbingConfig(**given)


def test_quick_keeps_the_sets_that_were_chosen() -> None:
    assert len(ProbingConfig().quick().sets) == 10
    assert ProbingConfig(sets=("mine.csv",)).quick().sets == ("mine.csv",)
    assert ProbingConfig(texts=100).quick().texts == 100
