"""Labels from a store: features that stand for known things get the right label and score."""

from pathlib import Path

import numpy as np
import pytest

from saescope.__main__ import main
from store import Annotations, FeatureStore
from store.labels.explanations import choose, gram_places
from store.labels.label import Labeller, LabelSettings, features_done, label_features
from store.labels.scores import auc, balanced_accuracy, detection
from store.labels.windows import Sampler
from store.machine_labels import MachineLabel
from tests.planted_store import (
    BEFORE,
    BIGRAM,
    CONTEXT,
    D_SAE,
    FIRST_RANDOM,
    TOKEN,
    TOPIC,
    make_planted_store,
)

SETTINGS = LabelSettings(windows=100, window=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planted_store(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def labels(made: Path) -> dict[tuple[int, str], MachineLabel]:
    with FeatureStore.open(made) as store:
        labeller = Labeller(store, SETTINGS)
        found = [each for number in range(D_SAE) for each in labeller.label(number)]
    return {(each.feature, each.method): each for each in found}


def test_a_feature_of_one_token(labels: dict[tuple[int, str], MachineLabel]) -> None:
    found = labels[TOKEN, "token"]
    assert found.label == "on “ river”"
    assert (found.score, found.details["auc"], found.details["top_token"]) == (1.0, 1.0, 1.0)
    assert found.details["windows"] == [100, 100]
    assert abs(found.details["shuffled"] - 0.5) < 0.15


def test_a_feature_of_two_tokens(labels: dict[tuple[int, str], MachineLabel]) -> None:
    found = labels[BIGRAM, "ngram"]
    assert found.label.startswith("at the end of “ winter river”")
    assert found.score is not None
    assert found.score > 0.95
    # a window with a river that no winter comes before is where one token alone is wrong
    token = labels[BIGRAM, "token"].score
    assert token is not None
    assert token < found.score - 0.05
    assert found.details["top_token"] < found.score - 0.05


def test_a_feature_of_a_topic(labels: dict[tuple[int, str], MachineLabel]) -> None:
    found = labels[TOPIC, "topic"]
    assert found.label in ("in documents titled report", "in documents titled sports")
    assert (found.score, found.details["auc"]) == (1.0, 1.0)
    for method in ("token", "ngram"):
        score = labels[TOPIC, method].score
        assert score is not None
        assert abs(score - 0.5) < 0.15


def test_a_feature_that_fires_before_what_it_raises(
    labels: dict[tuple[int, str], MachineLabel],
) -> None:
    found = labels[BEFORE, "logit"]
    assert found.label == "raises “ winter”"
    assert found.score is not None
    assert found.score > 0.95


def test_random_features_score_as_chance(labels: dict[tuple[int, str], MachineLabel]) -> None:
    for method in ("token", "ngram", "topic"):
        scores = [labels[n, method].score for n in range(FIRST_RANDOM, D_SAE)]
        known = np.array([score for score in scores if score is not None])
        assert len(known) == D_SAE - FIRST_RANDOM
        assert abs(known.mean() - 0.5) < 0.03, method
        assert np.abs(known - 0.5).max() < 0.15, method
        # what was fitted looks better than it is: why scores are held out
        fits = [labels[n, method].details["fit"] for n in range(FIRST_RANDOM, D_SAE)]
        assert np.mean(fits) > known.mean() + 0.01
    aucs = [labels[n, "token"].details["auc"] for n in range(FIRST_RANDOM, D_SAE)]
    assert abs(np.mean(aucs) - 0.5) < 0.04


def test_shuffled_labels_score_as_chance(labels: dict[tuple[int, str], MachineLabel]) -> None:
    # of random features: the others have tokens in common
    shuffled = [each.details["shuffled"] for each in labels.values() if each.feature > BEFORE]
    assert abs(np.mean(shuffled) - 0.5) < 0.03


def test_held_out_windows_have_no_document_of_the_others(made: Path) -> None:
    with FeatureStore.open(made) as store:
        sampler = Sampler(store, size=16)
        fires: dict[int, float] = dict(
            zip(*(each.tolist() for each in store.activations(TOKEN)), strict=True)
        )
        split = sampler.sample(TOKEN, fit=60, held_out=40)
        again = sampler.sample(TOKEN, fit=60, held_out=40)
        assert (split.held_out.tokens == again.held_out.tokens).all()
        for windows, count in ((split.fit, 60), (split.held_out, 40)):
            assert windows.active.tolist() == [True] * count + [False] * count
            # the activations are those of the store, at the tokens that it has there
            assert ((windows.activation > 0) == (windows.tokens == 1)).all()
            values = windows.activation[windows.activation > 0]
            assert set(values.tolist()) <= {float(np.float32(v)) for v in fires.values()}
        assert not set(split.fit.document) & set(split.held_out.document)


def test_windows_at_the_end_of_a_sequence(made: Path) -> None:
    with FeatureStore.open(made) as store:
        windows = Sampler(store, size=24).sample(TOKEN, fit=100, held_out=10).fit
        short = (windows.tokens == -1).any(axis=1)
        assert short.any()
        assert (windows.tokens[short] == -1).sum(axis=1).tolist() == [48 - CONTEXT] * short.sum()
        assert Sampler(store, size=1000).size == CONTEXT


def test_scores_by_hand() -> None:
    active = np.array([True, True, True, True, False, False])
    assert balanced_accuracy(active, np.array([1, 1, 1, 0, 1, 0], bool)) == (0.75 + 0.5) / 2
    # pairs: 4 x 2; 3 beats both, 2 beats 1 and ties with 2, 1 beats none and ties with 1, 0 none
    assert auc(active, np.array([3.0, 2.0, 1.0, 0.0, 2.0, 1.0])) == (2 + 1.5 + 0.5 + 0) / 8
    assert detection(active, np.ones(6)) is None, "too few silent windows"
    many = np.arange(20) < 10
    for constant in (0.0, 1.0):
        found = detection(many, np.full(20, constant))
        assert found is not None
        assert (found.balanced_accuracy, found.auc) == (0.5, 0.5)


def test_runs_of_tokens_by_hand() -> None:
    tokens = np.array([[1, 2, 3, 1, 2]], np.int32)
    assert gram_places(tokens, (1, 2)).tolist() == [[True, False, False, True]]
    assert gram_places(tokens, (1, 2, 3)).tolist() == [[True, False, False]]
    assert gram_places(tokens, (1, 2, 3, 1, 2, 1)).any() == np.False_


def test_candidates_are_chosen_for_their_union() -> None:
    active = np.array([True, True, True, True, False, False])
    present = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]], bool)
    assert choose(present, active) == [0, 2]


def test_labels_are_saved_and_gone_on_with(made: Path, capsys: pytest.CaptureFixture) -> None:
    with Annotations.open(made) as notes:
        notes.set_label(TOKEN, "somebody's")
    words = ["label", str(made), "--windows", "50", "--window", "16"]
    assert main([*words, "--features", "0-3"]) == 0
    said = capsys.readouterr().out
    assert "labelling: done, 4 features" in said
    with Annotations.open(made) as notes:
        before = notes.machine_labels(range(D_SAE))
        assert {each.feature for each in before} == {0, 1, 2, 3}
        assert notes.get(TOKEN).label == "somebody's"
        assert notes.best_machine_labels([TOKEN])[TOKEN].label == "on “ river”"
        assert notes.best_machine_labels([TOPIC])[TOPIC].method == "topic"
    assert main(words) == 0
    with Annotations.open(made) as notes, FeatureStore.open(made) as store:
        after = notes.machine_labels(range(D_SAE))
        assert {each.feature for each in after} == set(range(D_SAE))
        assert [each for each in after if each.feature < 4] == before, "not made twice"
        labeller = Labeller(store, LabelSettings(windows=50, window=16))
        assert features_done(labeller, notes) == set(range(D_SAE))
        other = Labeller(store, LabelSettings(windows=60, window=16))
        assert features_done(other, notes) == set()
        # labels do not depend on what else is labelled at the same time
        assert next(iter(label_features(labeller, notes, [5]))) == 1
        alone = {each.method: each for each in labeller.label(5)}
        for saved in (each for each in after if each.feature == 5):
            made_again = alone[saved.method]
            assert (saved.label, saved.score) == (made_again.label, made_again.score)
            assert saved.details == made_again.details


def test_wrong_settings(made: Path, capsys: pytest.CaptureFixture) -> None:
    for words, problem in (
        (["--methods", "magic"], "methods: no such method"),
        (["--windows", "2"], "windows: out of range"),
        (["--window", "0"], "window: out of range"),
    ):
        with pytest.raises(SystemExit):
            main(["label", str(made), *words])
        assert problem in capsys.readouterr().err
