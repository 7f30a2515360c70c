"""Directions of an SAE, CKNNA, hedging: by hand, and where the truth is planted."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sae.analysis.hedging import hedging_rate
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.evaluation.cknna import cknna
from sae.evaluation.geometry import PART, Geometry, decoder_cosines, nth_projection
from sae.evaluation.rows import pass_over
from saescope.errors import InputError

D = 6


def rows(n: int = 300, d: int = D, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def identity() -> TopKSAE:
    sae = TopKSAE(TopKConfig(d_sae=2 * D, k=2 * D), D)
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    with torch.no_grad():
        sae.W_dec.copy_(both)
        sae.W_enc_T.copy_(both)
    return sae


def geometry(sae: object, x: Tensor, size: int = 1000) -> dict:
    counted, (found,) = pass_over(sae, lambda: x.split(size), [Geometry])  # type: ignore[arg-type]
    return found.values(counted)


def test_of_the_identity() -> None:
    x = rows(2000)
    found = geometry(identity(), x)
    assert found["decoder_max_cosine"] == 0
    # each of 12 rows has one opposite: 12 of 12 x 11 pairs have |cosine| 1
    assert found["decoder_similarity"] == pytest.approx(1 / 11)
    assert found["encoder_decoder_cosine"] == pytest.approx(1)
    every = (x @ torch.cat([torch.eye(D), -torch.eye(D)]).T).flatten().sort(descending=True).values
    root = float(x.square().sum(1).mean().sqrt())
    wanted = float(every[int(PART * len(every))]) / root
    assert found["nth_decoder_projection"] == pytest.approx(wanted, abs=1e-3)
    assert 0.3 < found["cknna"] < 1


def test_pieces_do_not_matter() -> None:
    x = rows(900)
    whole, small = geometry(identity(), x), geometry(identity(), x, 100)
    assert small == pytest.approx(whole, rel=1e-5)


def test_cosines_of_many_features_are_those_of_the_whole_matrix() -> None:
    directions = rows(5000, 8, seed=3) * 4
    unit = functional.normalize(directions, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    found = decoder_cosines(directions)
    assert found is not None
    assert found[0] == pytest.approx(float(cosine.amax(1).double().mean()), rel=1e-5)
    total = float(cosine.fill_diagonal_(0).abs().double().sum())
    assert found[1] == pytest.approx(total / (5000 * 4999), rel=1e-5)
    assert decoder_cosines(directions[:1]) is None


@pytest.mark.parametrize("part", [0.1, PART, 0.5])
def test_the_projection_is_the_nth_of_all(part: float) -> None:
    x, directions = rows(500), functional.normalize(rows(40, seed=1), dim=1)
    every = (x @ directions.T).flatten().sort(descending=True).values
    wanted = float(every[int(part * len(every))])
    assert nth_projection(x, directions, part) == pytest.approx(wanted, abs=2e-3)


def naive_cknna(a: Tensor, b: Tensor, k: int) -> float:
    """As the paper has it, with loops."""
    n = len(a)
    kernels = [each.double() @ each.double().T for each in (a, b)]
    near = []
    for kernel in kernels:
        far = [[-float(kernel[i, j]) + 1e9 * (i == j) for j in range(n)] for i in range(n)]
        ranks = [sorted(range(n), key=each.__getitem__) for each in far]
        near.append([[float(j in each[:k]) for j in range(n)] for each in ranks])
    masks = [torch.tensor(each, dtype=torch.float64) for each in near]

    def hsic(k1: Tensor, k2: Tensor) -> Tensor:
        k1, k2 = k1 - torch.diag(torch.diag(k1)), k2 - torch.diag(torch.diag(k2))
        one = torch.ones(n, 1, dtype=torch.float64)
        first = torch.trace(k1 @ k2)
        second = (one.T @ k1 @ one) * (one.T @ k2 @ one) / ((n - 1) * (n - 2))
        third = 2 / (n - 2) * (one.T @ k1 @ k2 @ one)
        return (first + second - third).squeeze() / (n * (n - 3))

    both = masks[0] * masks[1]
    above = hsic(kernels[0] * both, kernels[1] * both)
    below = [hsic(k * m, k * m) for k, m in zip(kernels, masks, strict=True)]
    return float(above / (below[0] * below[1]).sqrt())


def test_cknna_against_loops() -> None:
    a, b = rows(40, 5), rows(40, 5) + 0.5 * rows(40, 5, seed=7)
    assert cknna(a, b, neighbours=4) == pytest.approx(naive_cknna(a, b, 4), rel=1e-9)


def test_cknna_tells_neighbourhoods() -> None:
    a = rows(200, 16)
    turned = a @ torch.linalg.qr(rows(16, 16, seed=5)).Q
    assert cknna(a, turned) == pytest.approx(1, abs=1e-4)
    unrelated = cknna(a, rows(200, 16, seed=9))
    assert unrelated is not None
    assert abs(unrelated) < 0.15
    assert cknna(a, torch.zeros(200, 3)) is None
    with pytest.raises(InputError, match="the same rows"):
        cknna(a, a[:9])


def test_hedging_is_seen_where_it_is_planted() -> None:
    """Features that held a part of what was added later lose it then."""
    full = functional.normalize(rows(40, 64), dim=1)
    narrow, added = full[:32], full[32:]
    mixed = narrow + 0.6 * added.repeat(4, 1)
    moved_at_random = narrow + 0.6 * functional.normalize(rows(32, 64, seed=4), dim=1)
    assert hedging_rate(mixed, full) > 0.2
    assert hedging_rate(moved_at_random, full) < 0.05
    assert hedging_rate(narrow, full) == 0
    # by hand: one feature of length 1 that loses half of what was added; chance is a random line's
    exact = hedging_rate(torch.tensor([[1.0, 0.5]]), torch.eye(2))
    assert 0 < exact < 0.5
    with pytest.raises(InputError, match="features added"):
        hedging_rate(full, full)


def test_an_sae_without_weights_has_no_geometry() -> None:
    class Coder:
        d_sae = D

    with pytest.raises(InputError, match="needs an SAE with weights"):
        pass_over(Coder(), lambda: [rows()], [Geometry])  # type: ignore[arg-type]
