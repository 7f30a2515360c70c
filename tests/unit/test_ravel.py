"""RAVEL: a model whose attributes are planted, and SAEs that can and cannot tell them apart."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.architectures.transcoder import Transcoder, TranscoderConfig
from sae.evaluation import on_texts
from sae.evaluation.ravel import ravel, summary
from sae.ravel import entities, suite
from sae.ravel.config import RavelConfig
from sae.ravel.entities import SLOT, EntityKind
from sae.ravel.pairs import drawn, pairs_of
from sae.ravel.questions import Answers, questions_of
from sae.ravel.swap import effects, ranked, with_features_of
from saescope.errors import InputError

COLOURS = ("red", "green", "blue", "black")
SIZES = ("small", "large", "huge")
ENTITIES = [f"thing{number}" for number in range(60)]
D = len(COLOURS) + len(SIZES)


def kind_of(name: str = "thing") -> EntityKind:
    """Sixty things with a colour and a size, asked for by one sentence each."""
    values = {
        each: {"colour": COLOURS[number % 4], "size": SIZES[number % 3]}
        for number, each in enumerate(ENTITIES)
    }
    sentences = {each: (f"the {each} of {SLOT} is",) for each in ("colour", "size")}
    return EntityKind(name=name, values=values, sentences=sentences)


@pytest.fixture(autouse=True)
def planted_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: kind_of(name) for name in ("thing", "other")}
    monkeypatch.setattr(entities, "entity_kinds", lambda: kinds)


class Planted:
    """A model whose activation at a thing is its colour's direction and its size's.

    The logit of a value, where its attribute is asked for, is that direction's part of the
    activation at the thing; of things in `unknown` that of "red" is larger.
    """

    def __init__(self, unknown: tuple[str, ...] = (), turned: tuple[str, ...] = ()) -> None:
        self.words = ["<s>", "the", "of", "is", "colour", "size", *COLOURS, *SIZES, *ENTITIES]
        self.unknown, self.turned = unknown, turned
        self.edits: list[Callable[[Tensor, Tensor], Tensor | None]] = []
        self.asked = 0

    def tokenize(self, text: str) -> list[int]:
        return [0, *(self.words.index(each) for each in text.split())]

    def d_in(self, site: str) -> int:
        assert site == "site"
        return D

    def facts(self) -> dict[str, Any]:
        return {"weights_hash": "w", "tokenizer_hash": "t", "dtype": "float32"}

    @contextmanager
    def edit(self, edits: dict[str, Any]) -> Iterator[None]:
        self.edits.append(edits["site"])
        yield
        self.edits.pop()

    def _activation(self, token: int) -> Tensor:
        x = torch.zeros(D)
        word = self.words[token]
        if word in ENTITIES:
            number = ENTITIES.index(word)
            x[number % 4], x[4 + number % 3] = 1.0, 1.0
            if word in self.turned:
                x = x.roll(1)
        return x

    def logits(self, tokens: Tensor, *, gradient: bool) -> Tensor:
        self.asked += len(tokens)
        h = torch.stack(
            [torch.stack([self._activation(each) for each in row]) for row in tokens.tolist()]
        )
        for edit in self.edits:
            edited = edit(h, torch.arange(tokens.shape[1]))
            h = h if edited is None else edited
        part = h.sum(1)
        out = part.new_full((*tokens.shape, len(self.words)), -9.0)
        at = self.words.index("red")
        for row, ids in enumerate(tokens.tolist()):
            if self.words[ids[2]] == "colour":
                out[row, -1, at : at + 4] = part[row, :4]
            else:
                out[row, -1, at + 4 : at + 7] = part[row, 4:]
            if self.words[ids[4]] in self.unknown:
                out[row, -1, at] = 5.0
        return out


def values_sae() -> TopKSAE:
    """A feature a value."""
    found = TopKSAE(TopKConfig(d_sae=D, k=2), D)
    with torch.no_grad():
        found.W_enc_T.copy_(torch.eye(D))
        found.W_dec.copy_(torch.eye(D))
        found.b_enc.zero_()
        found.b_dec.zero_()
    return found.eval()


def combinations_sae() -> TopKSAE:
    """A feature for each colour in each size, so that none is of one attribute alone."""
    pairs = [(c, s) for c in range(4) for s in range(3)]
    found = TopKSAE(TopKConfig(d_sae=len(pairs), k=1), D)
    with torch.no_grad():
        for feature, (colour, size) in enumerate(pairs):
            direction = torch.zeros(D)
            direction[colour] = direction[4 + size] = 1.0
            found.W_enc_T[feature], found.W_dec[feature] = direction, direction
        found.b_enc.fill_(-1.0)
        found.b_dec.zero_()
    return found.eval()


def given(folder: Path, **changes: Any) -> on_texts.OnTexts[RavelConfig]:
    rows = torch.stack([Planted()._activation(13 + number % 12) for number in range(64)])
    values: dict[str, Any] = {
        "model": Planted(),
        "site": "site",
        "sae": values_sae(),
        "sae_hash": "h",
        "seen": lambda x: x,
        "some_rows": lambda: (
            rows + 0.1 * torch.rand(64, D, generator=torch.Generator().manual_seed(0))
        ),
        "settings": RavelConfig(kinds=("thing",), ks=(1, 3, 7)),
        "cache": folder,
        "cache_limit": 10**9,
    }
    return on_texts.OnTexts(**(values | changes))


def rows_of(on: on_texts.OnTexts[RavelConfig], method: str) -> dict[str, dict[str, Any]]:
    return {row["attribute"]: row for row in on.tables["ravel"] if row["method"] == method}


def test_features_of_one_attribute_change_it_alone(tmp_path: Path) -> None:
    on = given(tmp_path)
    found = ravel(on)
    assert found["ravel_cause"] == found["ravel_isolation"] == found["ravel_disentangle"] == 1.0
    own = rows_of(on, "sae")
    assert set(own["colour"]["features"]) <= {0, 1, 2, 3}
    assert set(own["size"]["features"]) == {4, 5, 6}
    for method in ("all", "activation"):  # everything is swapped: nothing stays
        for row in rows_of(on, method).values():
            assert (row["cause"], row["isolation"], row["disentangle"]) == (1.0, 0.0, 0.5)
    assert found["ravel_cause_activation"] == 1.0
    assert found["ravel_disentangle_random"] < 1.0
    assert found["ravel_disentangle_untrained"] < 1.0
    assert found["attributes"] == 2
    assert found["pairs"] == 2 * 32
    assert not list(tmp_path.iterdir())  # what was kept for a resumption is gone


def test_features_of_both_attributes_cannot_isolate(tmp_path: Path) -> None:
    found = ravel(given(tmp_path, sae=combinations_sae()))
    assert found["ravel_disentangle"] <= 0.6
    assert found["ravel_cause_activation"] == 1.0


def test_what_is_not_known_is_not_asked_in_pairs_and_too_little_is_said(tmp_path: Path) -> None:
    on = given(tmp_path, model=Planted(unknown=tuple(ENTITIES[:20])))
    ravel(on)
    row = rows_of(on, "sae")["size"]
    # no unknown thing has a size that is answered right; 40 others are, half of them in the test
    assert row["known_train"] + row["known_test"] == 40
    knows_few = Planted(unknown=tuple(ENTITIES[12:]))
    with pytest.raises(InputError, match=r"knows too little.*8 training.*of 120"):
        ravel(given(tmp_path, model=knows_few))


def test_test_entities_decide_nothing(tmp_path: Path) -> None:
    order = drawn(kind_of(), 200, seed=0)
    plain, turned = given(tmp_path), given(tmp_path, model=Planted(turned=tuple(order[1::2])))
    ravel(plain)
    with pytest.raises(InputError, match="knows too little"):
        ravel(turned)  # turned things are answered wrong, so that none is left for the test
    half = order[1::2][:14]
    turned = given(tmp_path, model=Planted(turned=tuple(half)))
    ravel(turned)
    for method in ("sae", "untrained"):
        for attribute, row in rows_of(plain, method).items():
            assert rows_of(turned, method)[attribute]["features"] == row["features"]
    trained = given(tmp_path, model=Planted(turned=tuple(order[::2][:14])))
    ravel(trained)
    counts = [rows_of(each, "sae")["size"]["known_train"] for each in (plain, trained)]
    assert counts[1] < counts[0]  # the same change of training things is seen


def test_features_are_chosen_on_training_pairs_and_scored_on_test_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, scores, seen = drawn(kind_of(), 200, seed=0), suite.scores, []

    def spied(answers: Any, asked: Any, attribute: str, pairs: Any, swap: Any) -> Any:
        used = [index for each in pairs.values() for index in (*each.base, *each.source)]
        seen.append({asked.questions[index].entity for index in used})
        return scores(answers, asked, attribute, pairs, swap)

    monkeypatch.setattr(suite, "scores", spied)
    ravel(given(tmp_path, settings=RavelConfig(kinds=("thing",), ks=(1, 2))))
    one = 2 + len(suite.METHODS)  # two numbers of features are tried, then all methods tested
    assert len(seen) == 2 * one
    for number, used in enumerate(seen):
        assert used <= set(order[::2] if number % one < 2 else order[1::2])


def test_a_swap_of_no_feature_changes_no_bit_and_the_error_term_is_kept() -> None:
    draw = torch.Generator().manual_seed(1)
    x, source = (torch.randn(5, D, generator=draw) for _ in range(2))
    one = values_sae()
    none = np.zeros(0, np.int64)
    assert torch.equal(with_features_of(one, x, source, none, error=True), x)
    assert torch.equal(with_features_of(one, x, source, none, error=False), one(x).x_hat)
    whole = with_features_of(one, x, source, None, error=False)
    assert torch.allclose(whole, one(source).x_hat)
    kept = with_features_of(one, x, source, None, error=True)
    assert torch.allclose(kept, x - one(x).x_hat + one(source).x_hat, atol=1e-6)
    first = with_features_of(one, x, source, np.array([2]), error=True)
    f, g = one.encode(x), one.encode(source)
    assert torch.allclose(first - x, torch.outer(g[:, 2] - f[:, 2], one.W_dec[2]), atol=1e-6)


def test_effects_of_a_linear_model_are_what_swaps_do_to_margins() -> None:
    answers = Answers(model=Planted(), site="site")  # type: ignore[arg-type]
    asked = answers.ask(questions_of(answers.model, kind_of(), ENTITIES, 1))
    assert asked.known.all()
    pairs = pairs_of(
        asked, kind_of(), of="size", differing="colour", among=ENTITIES, most=40, seed=0
    )
    base = [asked.questions[each] for each in pairs.base]
    other = np.array([asked.questions[each].answer for each in pairs.source])
    x, source = asked.x[pairs.base], asked.x[pairs.source]
    margin, gradient = answers.margins(base, x, other)
    assert torch.equal(margin, torch.ones(40))
    one = values_sae()
    found = effects(one, x, source, margin, gradient)
    assert np.allclose(found[:4], 0.0)  # colours do nothing to a size
    for feature in (4, 5, 6):
        swapped = with_features_of(one, x, source, np.array([feature]), error=True)
        after = answers.margins(base, swapped, other)[0]
        assert found[feature] == pytest.approx(float((margin - after).sum() / margin.sum()))
    assert found.sum() == pytest.approx(2.0)  # margins of 1 become -1
    assert set(ranked({"size": found, "colour": np.zeros(D)}, "size")) == {4, 5, 6}
    assert not len(ranked({"size": np.zeros(D), "colour": found}, "size"))


def test_features_that_do_more_to_other_attributes_are_not_ranked() -> None:
    of = {
        "size": np.array([1.0, 2.0, 0.5, 3.0]),
        "colour": np.array([0.0, 3.0, 0.0, 0.5]),
        "age": np.array([0.0, 2.0, 0.0, 4.5]),
    }
    # less the others' mean: 1, -0.5, 0.5, 0.5; of equal ones the first
    assert ranked(of, "size").tolist() == [0, 2, 3]


def test_values_that_begin_alike_and_joined_tokens_are_left_out() -> None:
    class Joins(Planted):
        def tokenize(self, text: str) -> list[int]:
            whole = super().tokenize(text.replace("black", "blue").replace("large", "small"))
            return [*whole[:-2], 99] if text.endswith("huge") else whole

    found = questions_of(Joins(), kind_of(), ENTITIES, 1)  # type: ignore[arg-type]
    left = {(each.attribute, kind_of().values[each.entity][each.attribute]) for each in found}
    assert left == {("colour", "red"), ("colour", "green")}
    assert all(each.position == 4 and len(each.tokens) == 6 for each in found)


def test_pairs_differ_in_both_attributes_and_one_sentence_asks_both() -> None:
    kind = kind_of()
    answers = Answers(model=Planted(), site="site")  # type: ignore[arg-type]
    asked = answers.ask(questions_of(answers.model, kind, ENTITIES, 1))
    found = pairs_of(
        asked, kind, of="size", differing="colour", among=ENTITIES[:30], most=50, seed=3
    )
    assert len(found) == 50
    assert len(set(zip(found.base.tolist(), found.source.tolist(), strict=True))) == 50
    for base, source in zip(found.base, found.source, strict=True):
        one, other = asked.questions[base], asked.questions[source]
        assert one.attribute == other.attribute == "size"
        assert {one.entity, other.entity} <= set(ENTITIES[:30])
        for attribute in ("colour", "size"):
            assert kind.values[one.entity][attribute] != kind.values[other.entity][attribute]


def test_after_a_kill_kinds_that_are_done_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RavelConfig(kinds=("thing", "other"), ks=(3,))
    whole = given(tmp_path / "whole", settings=config)
    expected = ravel(whole)
    measure, calls = suite.measure_kind, []

    def killed(*words: Any) -> Any:
        calls.append(words[1])
        if words[1] == "other" and len(calls) < 3:
            raise KeyboardInterrupt
        return measure(*words)

    monkeypatch.setattr(suite, "measure_kind", killed)
    on = given(tmp_path / "cut", settings=config)
    with pytest.raises(KeyboardInterrupt):
        ravel(on)
    assert ravel(on) == expected
    assert calls == ["thing", "other", "other"]
    assert on.tables == whole.tables


def test_means_over_attributes_by_hand() -> None:
    methods = {"sae": 0.1, "random": 0.2, "untrained": 0.3, "activation": 0.4, "all": 0.5}
    common = {"kind": "city", "isolation": 0.5, "pairs": 7}
    rows = [
        {**common, "method": name, "cause": c, "attribute": attribute, "disentangle": c + shift}
        for name, c in methods.items()
        for attribute, shift in (("country", 0.0), ("language", 0.2))
    ]
    found = summary(rows)
    assert found["ravel_disentangle"] == pytest.approx(0.2)
    # t(0.975, 1) = 12.7062; the variance of 0.1 and 0.3 is 0.02
    assert found["ravel_disentangle_interval"] == pytest.approx(12.7062047 * 0.1)
    assert found["ravel_disentangle_random"] == pytest.approx(0.3)
    assert found["ravel_disentangle_random_difference"] == pytest.approx(-0.1)
    assert found["ravel_disentangle_random_difference_interval"] == pytest.approx(0, abs=1e-9)
    assert found["ravel_cause_activation"] == pytest.approx(0.4)
    assert (found["attributes"], found["pairs"]) == (2, 14)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"kinds": ()}, "ravel.kinds"),
        ({"ks": (4, 4)}, "ravel.ks"),
        ({"ks": (0,)}, "ravel.ks"),
        ({"sentences": 3}, "ravel.sentences"),
        ({"pairs": 1}, "ravel.pairs"),
        ({"entities": 2}, "ravel.entities"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError, match=where):
        RavelConfig(**changes)


def test_wrong_saes_and_kinds_are_named(tmp_path: Path) -> None:
    transcoder = Transcoder(TranscoderConfig(d_sae=D, k=2), D, D)
    with pytest.raises(InputError, match="transcoder"):
        ravel(given(tmp_path, sae=transcoder))
    behind = values_sae()
    behind.metadata["lens"] = "lens"
    with pytest.raises(InputError, match="tuned lens"):
        ravel(given(tmp_path, sae=behind))
    with pytest.raises(InputError, match=r"no such kind.*planet.*thing"):
        ravel(given(tmp_path, settings=RavelConfig(kinds=("planet",))))
