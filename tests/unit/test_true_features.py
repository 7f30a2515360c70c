"""Scores against true features: by hand, by a dense reference, and for SAEs of known worth."""

from collections.abc import Iterator

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae.architectures import architecture
from sae.core.base import SparseAutoencoder
from sae.evaluation.true_features import Detection, TrueFeatureScores, score_true_features
from sae.kernels.codes import SparseCodes
from sae.synthetic.drawing import Drawing, DrawnRows
from sae.synthetic.world import World, named_world
from saescope.errors import InputError

ROWS = 3000


class Oracle:
    """Gives back chosen codes with chosen decoder rows."""

    def __init__(self, dictionary: Tensor, codes: Iterator[SparseCodes], bias: Tensor) -> None:
        self.dictionary, self.codes, self.bias = dictionary, codes, bias
        self.d_sae = len(dictionary)

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        codes = next(self.codes)
        assert codes.batch == len(x)
        return codes

    def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
        return codes.dense() @ self.dictionary + self.bias


@pytest.fixture(scope="module")
def world() -> World:
    return named_world("synth:tiny")


@pytest.fixture(scope="module")
def drawn(world: World) -> list[DrawnRows]:
    drawing = Drawing(world, seed=8)
    return [drawing.with_codes(first, 1000) for first in range(0, ROWS, 1000)]


def untrained(kind: str, d_in: int, **more: int) -> SparseAutoencoder:
    torch.manual_seed(0)
    cls = architecture(kind)
    return cls(cls.Config(d_sae=40, **more), d_in).eval()


def dense_scores(
    latents: Tensor, x_hat: Tensor, x: Tensor, true: Tensor, dictionary: Tensor, directions: Tensor
) -> dict[str, float]:
    """The same scores of dense latents [rows, d_sae] and true codes [rows, features], by loops."""
    cosine = torch.nn.functional.cosine_similarity(
        dictionary.detach().double()[:, None], directions.double()[None], dim=2
    ).abs()
    row, column = linear_sum_assignment(-cosine.numpy())
    best = cosine.argmax(1).tolist()
    sums = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 0.0}
    for latent, feature in enumerate(best):
        fires, truth = latents[:, latent] != 0, true[:, feature] > 0
        hits = int((fires & truth).sum())
        precision = hits / int(fires.sum()) if fires.any() else 0.0
        recall = hits / int(truth.sum()) if truth.any() else 0.0
        sums["precision"] += precision / len(best)
        sums["recall"] += recall / len(best)
        if precision + recall:
            sums["f1"] += 2 * precision * recall / (precision + recall) / len(best)
        sums["accuracy"] += float((fires == truth).double().mean()) / len(best)
    x, x_hat = x.double(), x_hat.double()
    return {
        "rows": len(x),
        "true_l0": float((true > 0).sum(1).double().mean()),
        "l0": float((latents != 0).sum(1).double().mean()),
        "dead_latents": int((latents == 0).all(0).sum()),
        "shrinkage": float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()),
        "explained_variance": 1
        - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()),
        "mcc": float(cosine[row, column].mean()),
        "uniqueness": len(set(best)) / len(best),
        **sums,
    }


@pytest.mark.parametrize(
    ("kind", "more"), [("relu", {}), ("topk", {"k": 5}), ("abstopk", {"k": 5})]
)
def test_scores_are_those_of_a_dense_reference(
    kind: str, more: dict[str, int], world: World, drawn: list[DrawnRows]
) -> None:
    sae = untrained(kind, world.config.d_in, **more)
    found = score_true_features(sae, sae.W_dec, world.directions, drawn)
    x = torch.cat([each.x for each in drawn])
    true = torch.cat([each.codes.dense() for each in drawn])
    with torch.no_grad():
        latents, x_hat = sae.encode(x), sae(x).x_hat
    expected = dense_scores(latents, x_hat, x, true, sae.W_dec, world.directions)
    assert 0 < expected["f1"] < 0.5
    assert vars(found) == pytest.approx(expected, rel=1e-6)


def test_the_truth_scores_one(world: World, drawn: list[DrawnRows]) -> None:
    oracle = Oracle(3 * world.directions, iter([each.codes for each in drawn]), world.bias)
    oracle.codes = iter([each.codes.scale(1 / 3) for each in drawn])
    found = score_true_features(oracle, oracle.dictionary, world.directions, drawn)
    fires = sum(each.codes.counts() for each in drawn)
    assert isinstance(fires, Tensor)
    alive = float((fires > 0).double().mean())  # the rarest features may not fire on so few rows
    for name in ("precision", "recall", "f1"):
        assert getattr(found, name) == pytest.approx(alive), name
    assert found.accuracy == found.uniqueness == 1
    for name in ("mcc", "shrinkage", "explained_variance"):
        assert getattr(found, name) == pytest.approx(1, abs=1e-6), name
    assert found.l0 == found.true_l0
    assert found.dead_latents == int((fires == 0).sum())


def test_the_truth_for_other_features_scores_nothing(world: World, drawn: list[DrawnRows]) -> None:
    permuted = world.directions.flip(0)  # decoder rows in another order than the codes
    oracle = Oracle(permuted, iter([each.codes for each in drawn]), world.bias)
    found = score_true_features(oracle, permuted, world.directions, drawn)
    assert found.mcc == pytest.approx(1, abs=1e-6)
    assert found.f1 < 0.2
    assert found.explained_variance < 0


def test_detection_by_hand() -> None:
    detected = Detection(torch.tensor([1, 1, 0]), 3)
    found = torch.tensor([[2.0, 0, 0], [1, -1, 0], [0, 0, 0], [3, 0, 0]])
    true = torch.tensor([[0.0, 4, 0], [0, 5, 1], [0, 6, 0], [0, 0, 2]])
    detected.add(SparseCodes.from_dense(found), SparseCodes.from_dense(true))
    by_latent = {name: each.tolist() for name, each in detected.by_latent(4).items()}
    # feature 1 fires on rows 0, 1, 2; latent 0 on 0, 1, 3; latent 1 on 1; feature 0 never
    assert by_latent["precision"] == pytest.approx([2 / 3, 1, 0])
    assert by_latent["recall"] == pytest.approx([2 / 3, 1 / 3, 0])
    assert by_latent["f1"] == pytest.approx([2 / 3, 1 / 2, 0])
    assert by_latent["accuracy"] == pytest.approx([2 / 4, 2 / 4, 1])


def test_rows_on_which_nothing_fires() -> None:
    detected = Detection(torch.tensor([1, 0]), 2)
    some = SparseCodes.from_dense(torch.tensor([[1.0, 0], [0, 1]]))
    detected.add(some, SparseCodes.none(torch.zeros(2, 1), 2))
    assert detected.both.tolist() == [0, 0]
    assert detected.fired.tolist() == [1, 1]


def test_scores_do_not_depend_on_how_rows_come(world: World, drawn: list[DrawnRows]) -> None:
    sae = untrained("relu", world.config.d_in)

    def scores(step: int) -> TrueFeatureScores:
        drawing = Drawing(world, seed=8)
        pieces = (drawing.with_codes(first, step) for first in range(0, 600, step))
        return score_true_features(sae, sae.W_dec, world.directions, pieces)

    assert vars(scores(600)) == pytest.approx(vars(scores(60)), rel=1e-12)


def test_wrong_input_is_named(world: World, drawn: list[DrawnRows]) -> None:
    sae = untrained("relu", world.config.d_in)
    with pytest.raises(InputError, match="no rows"):
        score_true_features(sae, sae.W_dec, world.directions, [])
    x = drawn[0].x.clone()
    x[3, 2] = float("nan")
    for rows, message in ((x, "rows"), (torch.ones_like(x), "all rows are equal")):
        pieces = [DrawnRows(rows, drawn[0].codes)]
        with pytest.raises(InputError, match=message):
            score_true_features(sae, sae.W_dec, world.directions, pieces)
