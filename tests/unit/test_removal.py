"""Removal of concepts: definitions by hand, and texts whose scores are known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.probing import perturbation, spurious
from sae.probing.labelled_sets import LabelledSet
from sae.probing.logistic import Probe
from sae.probing.removal import effects, largest, without
from sae.probing.removal_config import SCRConfig, TPPConfig
from sae.probing.text_features import Subject, TextFeatures
from saescope.errors import InputError

D = 30


def two_sided(x: np.ndarray) -> sparse.csr_array:
    """Features of an SAE that sees each coordinate, on either side: [rows, 2 D]."""
    return sparse.csr_array(np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], axis=1))


def subject() -> Subject:
    """An oracle beside one whose features write what no probe reads."""
    oracle = torch.cat([torch.eye(D), -torch.eye(D)])
    blind = torch.zeros(2 * D, D)
    blind[:, -1] = 1.0
    given: Any = {
        "sae": SimpleNamespace(W_dec=oracle),
        "untrained": SimpleNamespace(W_dec=blind),
        "seen": None,
        "cache": None,
        "sae_hash": "h",
    }
    return Subject(**given)


def texts_of(x: np.ndarray) -> TextFeatures:
    codes = two_sided(x)
    return TextFeatures(x=x, codes={"sae": codes, "untrained": codes})


def crossed(texts: int = 800) -> tuple[TextFeatures, np.ndarray]:
    """Texts with two attributes: the first in coordinate 0 and faint, the second in 1 and plain."""
    draw = np.random.default_rng(0)
    labels = np.array([[a, b] for a in (False, True) for b in (False, True)] * (texts // 4))
    x = 0.3 * draw.standard_normal((texts, D))
    x[:, :2] += np.where(labels, 1.0, -1.0) * [0.6, 3.0]
    x[:, -1] = 0.0
    return texts_of(x), labels


def values(rows: list[dict[str, Any]], name: str, **wanted: Any) -> list[Any]:
    return [row[name] for row in rows if all(row[key] == each for key, each in wanted.items())]


# ---- definitions ---------------------------------------------------------------------------------


def test_effects_by_hand() -> None:
    """Differences of means 2, -1, 0; w = (1, 2) / (1, 4); what is written: 3, 0.5, 1."""
    codes = np.array([[1.0, 1.0, 5.0], [0.0, 1.0, 5.0], [3.0, 0.0, 5.0], [2.0, 0.0, 5.0]])
    y = np.array([False, False, True, True])
    decoder = np.array([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    probe = Probe(np.zeros(2), np.array([1.0, 4.0]), np.array([1.0, 2.0]), 0.0, 1.0)
    for given in (codes, sparse.csr_array(codes)):
        assert effects(given, y, decoder, probe, signed=False).tolist() == [6.0, 0.5, 0.0]
        assert effects(given, y, decoder, probe, signed=True).tolist() == [6.0, 0.0, 0.0]
    assert largest(np.array([6.0, 0.0, -0.5]), 3).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (TopKSAE, TopKConfig(d_sae=40, k=6)),
        (AbsTopKSAE, AbsTopKConfig(d_sae=40, k=6)),
        (JumpReLUSAE, JumpReLUConfig(d_sae=40)),
    ],
)
def test_the_error_is_kept(kind: Any, config: Any) -> None:
    """x' = x + decode(f') - decode(f), and without an ablated feature no bit changes."""
    torch.manual_seed(0)
    sae = kind(config, 12).eval()
    x = torch.randn(20, 12)
    with torch.no_grad():
        sae.b_dec.normal_()
        codes = sae.encode(x)
        chosen = codes.abs().sum(0).argsort(descending=True)[:7].numpy()
        fewer = codes.clone()
        fewer[:, chosen] = 0
        expected = x + sae.decode(fewer, like=x) - sae.decode(codes, like=x)
        decoder = sae.W_dec.double().numpy()
    exact, features = x.double().numpy(), codes.double().numpy()
    found = without(exact, sparse.csr_array(features), decoder, chosen)
    assert np.abs(found - expected.numpy()).max() < 1e-5
    assert np.abs(found - exact).max() > 0.1
    none = without(exact, sparse.csr_array(features), decoder, chosen[:0])
    assert none.tobytes() == exact.tobytes()
    silent = np.flatnonzero(features.any(0) == False)[:2]  # noqa: E712
    assert without(exact, sparse.csr_array(features), decoder, silent).tobytes() == exact.tobytes()


# ---- spurious correlation removal ----------------------------------------------------------------


def test_an_oracle_removes_a_spurious_attribute_and_chance_does_not() -> None:
    features, labels = crossed()
    rows = [
        {"pair": "p", **row}
        for seed in range(3)
        for row in spurious.division_rows(features, labels, subject(), (2, 4), seed)
    ]
    assert set(values(rows, "concept", scored=True)) == {0}  # the faint attribute
    for row in rows:
        if row["method"] == "sae" and row["concept"] == 0 and row["n"] == 2:
            assert sorted(row["features"]) == [1, D + 1]  # the other's two sides
            assert row["accuracy_biased"] < 0.6
    scores = spurious.scr_scores(rows)
    assert values(scores, "scr", pair=None, method="sae", n=2)[0] == pytest.approx(1.0, abs=0.05)
    for method in ("random", "untrained"):
        assert values(scores, "scr", pair=None, method=method, n=2)[0] == pytest.approx(0, abs=0.05)


def test_test_labels_decide_neither_features_nor_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = crossed(240)
    divided = spurious._divided(labels, 0)
    monkeypatch.setattr(spurious, "_divided", lambda *_: divided)
    turned = labels.copy()
    turned[divided[1]] = np.random.default_rng(1).permutation(~labels[divided[1]])
    one, other = (
        list(spurious.division_rows(features, each, subject(), (2, 5), 0))
        for each in (labels, turned)
    )
    for name in ("features", "scored", "method", "n"):
        assert values(one, name) == values(other, name)
    assert values(one, "accuracy_clean") != values(other, "accuracy_clean")


def test_scores_of_pairs_by_hand() -> None:
    """p: (0.1 + 0.3) / (0.4 + 0.4); q has nothing to win; t(0.975, 1) = 12.706."""

    def row(pair: str, seed: int, ablated: float, clean: float = 0.9) -> dict[str, Any]:
        return {
            "pair": pair,
            "seed": seed,
            "scored": True,
            "method": "sae",
            "n": 2,
            "accuracy_biased": 0.5,
            "accuracy_clean": clean,
            "accuracy_ablated": ablated,
        }

    rows = [row("p", 0, 0.6), row("p", 1, 0.8), row("q", 0, 0.7, 0.5), row("q", 1, 0.7, 0.5)]
    found = spurious.scr_scores([*rows, row("p", 0, 0.0) | {"scored": False}])
    mean, p, q = found
    assert (mean["pairs"], p["pair"], q["pair"]) == (1, "p", "q")
    assert mean["scr"] == p["scr"] == pytest.approx(0.5)
    # residuals -0.1 and 0.1 over a gap of 0.4: sqrt(2 * 0.25^2 / 2)
    assert p["scr_interval"] == pytest.approx(12.7062047 * 0.25)
    assert q["scr"] is None
    assert (p["gap"], q["gap"]) == (pytest.approx(0.4), pytest.approx(0.0))


def labelled(name: str, texts: dict[str, bool]) -> LabelledSet:
    return LabelledSet(
        name=name, texts=tuple(texts), labels=np.array([*texts.values()]), origins=()
    )


def test_pairs_are_balanced_and_too_few_texts_are_named() -> None:
    a = labelled("a", {f"t{number}": number % 2 == 0 for number in range(100)})
    b = labelled("b", {f"t{number}": number % 4 < 2 for number in range(20, 120)})
    pair = spurious.paired(a, b, 15)
    assert len(pair.texts) == 60
    for text, (first, second) in zip(pair.texts, pair.labels.tolist(), strict=True):
        number = int(text[1:])
        assert (first, second) == (number % 2 == 0, number % 4 < 2)
    assert sorted(map(tuple, pair.labels.tolist())) == sorted(spurious.COMBINATIONS * 15)
    same = labelled("same", dict(zip(a.texts, a.labels.tolist(), strict=True)))
    with pytest.raises(InputError, match=r"a::same.*10 texts in common.*0 with labels 0 and 1"):
        spurious.paired(a, same, 15)
    with pytest.raises(InputError, match="0 with labels 0 and 0"):
        spurious.paired(a, labelled("other", {"x": True, "y": False}), 15)


# ---- targeted perturbation -----------------------------------------------------------------------


def of_classes() -> tuple[TextFeatures, np.ndarray]:
    """Texts of four classes, each with a coordinate of its own."""
    draw = np.random.default_rng(0)
    label = np.repeat(np.arange(4), 100)
    x = 0.1 * draw.standard_normal((400, D))
    x[np.arange(400), label] += 2.0
    x[:, -1] = 0.0
    return texts_of(x), label


def test_an_oracle_perturbs_one_class_and_chance_none() -> None:
    """The probe falls from 1 to about a half where its class can no longer be told."""
    features, label = of_classes()
    rows = [
        {"group": "g", **row}
        for seed in range(2)
        for row in perturbation.division_rows(features, label, subject(), (1, 2), seed)
    ]
    for each in range(4):
        assert values(rows, "features", **{"class": each, "method": "sae", "n": 1}) == [[each]] * 2
    drawn = values(rows, "features", method="random", n=2)
    assert len(set(map(tuple, drawn))) == len(drawn)  # for each class and division its own
    scores = perturbation.tpp_scores(rows)
    assert values(scores, "tpp", group=None, method="sae", n=1)[0] > 0.35
    for method in ("random", "untrained"):  # one of the eight random ones is another class's
        assert abs(values(scores, "tpp", group=None, method=method, n=1)[0]) < 0.06


def test_test_labels_do_not_decide_perturbed_features(monkeypatch: pytest.MonkeyPatch) -> None:
    features, label = of_classes()
    divided = perturbation._divided(label, np.random.default_rng(0))
    monkeypatch.setattr(perturbation, "_divided", lambda *_: divided)
    turned = label.copy()
    turned[divided[1]] = np.random.default_rng(1).permutation(label[divided[1]])
    one, other = (
        list(perturbation.division_rows(features, each, subject(), (3,), 0))
        for each in (label, turned)
    )
    assert values(one, "features", method="sae") == values(other, "features", method="sae")
    assert values(one, "accuracy_clean") != values(other, "accuracy_clean")


def test_perturbation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies 0.9, 0.8, 0.7; with the first class ablated 0.5, 0.8, 0.6: 0.4 - 0.05."""
    features, label = of_classes()
    kept = np.flatnonzero(label < 3)
    told = iter([0.9, 0.8, 0.7, 0.5, 0.8, 0.6] + [0.7] * 1000)
    monkeypatch.setattr(perturbation, "accuracy", lambda *_: next(told))
    row = next(perturbation.division_rows(features.known(kept), label[kept], subject(), (1,), 0))
    assert row["intended"] == pytest.approx(0.4)
    assert row["unintended"] == pytest.approx(0.05)
    assert row["tpp"] == pytest.approx(0.35)


def test_means_over_classes_divisions_and_groups_by_hand() -> None:
    def row(group: str, seed: int, tpp: float) -> dict[str, Any]:
        return {
            "group": group,
            "seed": seed,
            "method": "sae",
            "n": 2,
            "tpp": tpp,
            "intended": 2 * tpp,
            "unintended": tpp,
        }

    rows = [
        row("g", 0, 0.1),
        row("g", 0, 0.3),
        row("g", 1, 0.4),
        row("h", 0, 0.4),
        row("h", 1, 0.2),
    ]
    mean, g, h = perturbation.tpp_scores(rows)
    assert (g["tpp"], h["tpp"]) == (pytest.approx(0.3), pytest.approx(0.3))
    assert mean["tpp"] == pytest.approx(0.3)
    assert mean["tpp_interval"] == pytest.approx(0.0, abs=1e-12)  # 0.3 in both divisions
    assert g["tpp_interval"] == pytest.approx(12.7062047 * 0.1)


def test_a_group_has_texts_of_one_class_and_as_many_of_each() -> None:
    sets = {
        name: labelled(
            name, {f"{own}{number}": own == name for own in "abc" for number in range(20)}
        )
        for name in "abc"
    }
    both = dict(zip(sets["a"].texts, sets["a"].labels.tolist(), strict=True)) | {"b0": True}
    group = perturbation.group_of("g", {**sets, "a": labelled("a", both)}, 2, 15)
    assert group.classes == ("a", "c")  # b lost the text that is of a too
    assert np.bincount(group.label).tolist() == [15, 15]
    for text, index in zip(group.texts, group.label.tolist(), strict=True):
        assert text[0] == group.classes[index]
    with pytest.raises(InputError, match="g: needs two classes with 10 texts each"):
        perturbation.group_of("g", {"a": sets["a"]}, 5, 15)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InputError, match=r"scr\.pairs: needs two sets with :: between"):
        SCRConfig(pairs=("ovos/person",))
    with pytest.raises(InputError, match=r"tpp\.groups: no groups"):
        TPPConfig(groups=())
    with pytest.raises(InputError, match=r"scr\.ns: needs different"):
        SCRConfig(ns=(2, 2))
    with pytest.raises(InputError, match=r"tpp\.classes.*1"):
        TPPConfig(classes=1)
