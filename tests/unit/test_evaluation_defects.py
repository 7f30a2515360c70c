"""Defects published of other evaluations (SAEBench, SAELens), as tests of ours.

Each is named after its defect, and shows first that the wrong formula would be wrong here. Some
stand with what they are of: reconstructions at special positions (test_downstream), the epoch of a
probe chosen on test texts (test_probing, where turned test labels change no choice).
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from activations import ActivationStore
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.normaliser import Normaliser
from sae.evaluation.density import Density
from sae.evaluation.divergence import divergence_in_place
from sae.evaluation.reconstruction import Fidelity, measure_reconstruction
from sae.evaluation.rows import Counted, Piece, RowSums, Setting, pass_over
from sae.evaluation.shrinkage import Shrinkage
from sae.kernels.codes import SparseCodes
from tests.tiny import make_tiny_harvest, make_tiny_model

D = 4


class Half:
    """Features are coordinates; a reconstruction moves half of the way from `centre`."""

    d_sae = D

    def __init__(self, centre: Tensor | float = 0.0) -> None:
        self.centre = centre

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(x)

    def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
        del codes
        return self.centre + 0.5 * (like - self.centre)


def rows(n: int = 2000) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_explained_variance_is_not_about_zero() -> None:
    """SAEBench to 0.6.0 and SAELens #659: a large mean made any reconstruction look perfect."""
    x = rows() + 100
    x_hat = 100 + 0.5 * (x - 100)
    assert float((x - x_hat).square().sum() / x.square().sum()) < 1e-4
    assert measure_reconstruction(Half(100.0), lambda: [x]).fvu == pytest.approx(0.25, rel=5e-3)


def test_the_variance_is_not_that_of_each_batch() -> None:
    """The legacy formula takes each batch's own mean: batches of one kind have little variance."""
    x = rows(1000)
    x[500:] += 30
    batches = x.split(500)
    error = 0.25 * (x - 15).square().sum()
    legacy = error / sum((each - each.mean(0)).square().sum() for each in batches)
    assert legacy > 10
    found = measure_reconstruction(Half(15.0), lambda: iter(batches))
    assert found.fvu == pytest.approx(0.25, rel=5e-3)


def test_bos_does_not_inflate(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One BOS of norm 3,000 in 128 rows explains 99.7% of "the variance": it is never a row."""
    x = rows(128) * 4
    bos = torch.full((1, D), 1500.0, dtype=torch.float64)
    with_bos = torch.cat([x, bos])
    lost = torch.cat([x, torch.zeros_like(bos)])
    deviation = (with_bos - with_bos.mean(0)).square().sum()
    assert float(lost.square().sum() / deviation) < 0.01
    folder = tmp_path_factory.mktemp("bos")
    store = ActivationStore.open(make_tiny_harvest(folder, make_tiny_model(folder / "model")))
    tokens, keep = torch.from_numpy(store.tokens[:]), torch.from_numpy(store.keep[:])
    assert not keep[:, 0].any()
    assert not keep[tokens == store.manifest["model"]["bos_token_id"]].any()
    assert store.n_rows("train") + store.n_rows("held_out") == int(keep.sum())


def test_kl_survives_a_probability_of_zero() -> None:
    """log(softmax(z)) is -inf where softmax underflows, and 0 times that is NaN, written as -1."""
    clean, other = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    p, q = clean.softmax(-1), other.softmax(-1)
    assert (p * (p.log() - q.log())).sum().isnan()
    assert float(divergence_in_place(clean, other)) == pytest.approx(200)


def test_counts_go_beyond_what_16_bits_hold() -> None:
    """bfloat16 counts to 256 and stays there."""
    assert torch.tensor(256.0, dtype=torch.bfloat16) + 1 == 256
    x = torch.ones(70_000, D)
    x[0, 1:] = 2
    counted, (density,) = pass_over(Half(), lambda: x.split(300), [Density])
    assert density.values(counted)["l0"] == D
    assert isinstance(density, Density)
    assert density.fired.tolist() == [70_000] * D


def test_an_error_is_not_divided_by_the_tokens_twice() -> None:
    """SAEBench's mse divides each row's error by the batch's rows, then takes the mean over all."""
    x = rows(1000)
    error = 0.25 * x.square().sum(1)

    def wrong(size: int) -> float:
        return float(torch.cat([each / len(each) for each in error.split(size)]).mean())

    assert wrong(10) == pytest.approx(10 * wrong(100))  # it is of the batch's size, not of the SAE
    right = float(error.sum() / (x - x.mean(0)).square().sum())
    found = [measure_reconstruction(Half(), lambda n=n: x.split(n)).fvu for n in (10, 100, 1000)]
    assert found == pytest.approx([right] * 3, rel=1e-9)


def test_a_variance_does_not_lose_its_digits() -> None:
    """E[x^2] - E[x]^2 of rows in bfloat16 far from 0 is rounding: here 9 becomes 16, or 0."""
    x = (rows() * 3 + 60).bfloat16()
    short = x.square().mean(0) - x.mean(0).square()
    exact = x.double().var(0, correction=0)
    assert float((short.double() / exact - 1).abs().max()) > 0.5
    found = measure_reconstruction(Half(60.0), lambda: x.split(7))
    error = 0.25 * (x.double() - 60).square().sum() / (exact.sum() * len(x))
    assert found.fvu == pytest.approx(float(error), rel=2e-2)
    assert 0.23 < found.fvu < 0.27


def test_reconstructions_are_in_the_units_of_the_rows() -> None:
    """SAELens #518 compared scaled rows with reconstructions that were not."""
    x = rows().float() * 40
    sae = TopKSAE(TopKConfig(d_sae=2 * D, k=D), D)
    sae.normaliser = Normaliser.fit(
        "unit_mean_square", mean=x.mean(0), mean_square=float(x.square().sum(1).mean())
    )
    with torch.no_grad():
        basis = torch.cat([torch.eye(D), -torch.eye(D)])
        sae.W_enc_T.copy_(basis)
        sae.W_dec.copy_(basis)
    scaled = sae.normaliser.apply(x)
    assert float((scaled - x).square().sum() / x.square().sum()) > 0.5
    found = measure_reconstruction(sae, lambda: [x])
    assert found.fvu == pytest.approx(0, abs=1e-9)
    assert found.norm_ratio == pytest.approx(1)


def test_what_is_undefined_is_no_number() -> None:
    """SAEBench writes -1 for NaN: rows of 0 have no cosine, and no ratio of lengths."""
    x = torch.zeros(10, D)
    x[0, 0], x[1, 1] = 3, 4
    assert torch.nn.functional.normalize(x, dim=1).norm(dim=1).tolist()[2:] == [0.0] * 8
    assert (x / x.norm(dim=1, keepdim=True)).isnan().any()
    counted, (fidelity, shrinkage) = pass_over(Half(), lambda: [x], [Fidelity, Shrinkage])
    found = fidelity.values(counted) | shrinkage.values(counted)
    assert (found["cosine"], found["l2_ratio"]) == (1.0, 0.5)
    sums = Shrinkage(Setting(d_sae=D, mean=torch.zeros(D, dtype=torch.float64)))
    none = sums.values(Counted(rows=0, document=None))
    assert (none["l2_ratio"], none["reconstruction_bias"]) == (None, None)


def test_a_feature_below_zero_is_active() -> None:
    """SAELens and SAEBench counted f > 0: half of what signed features do."""
    x = torch.tensor([[-1.0, 2.0, 0.0, 0.0], [-3.0, -4.0, 0.0, 0.0]])
    assert float((x > 0).sum(1).float().mean()) == 0.5
    counted, (density,) = pass_over(Half(), lambda: [x], [Density])
    found = density.values(counted)
    assert (found["l0"], found["dead_fraction"]) == (2.0, 0.5)


@pytest.mark.parametrize("family", [Fidelity, Shrinkage])
def test_no_ratio_is_a_mean_of_batches_ratios(family: type[RowSums]) -> None:
    """SAEBench divides its mse by the batch's tokens twice and averages gamma over batches."""
    x = rows(999) * torch.linspace(0.1, 10, 999, dtype=torch.float64)[:, None]

    class Uneven(Half):
        def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
            del codes
            return like * (like.norm(dim=1, keepdim=True) > 5)

    def values(size: int) -> dict[str, float]:
        def pieces() -> Iterator[Piece]:
            for part in x.split(size):
                yield Piece(part, part)

        counted, (sums,) = pass_over(Uneven(), pieces, [family])
        found = sums.values(counted)
        return {name: value for name, value in found.items() if isinstance(value, float)}

    whole, small = values(999), values(7)
    assert len(whole) >= 3
    assert small == pytest.approx(whole, rel=1e-9)
