"""Defects published of other evaluations (SAEBench, SAELens), as tests of ours.

Each is named after its defect, and shows first that the wrong formula would be wrong here.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from activations import ActivationStore
from sae.evaluation.density import Density
from sae.evaluation.divergence import divergence_in_place
from sae.evaluation.reconstruction import Fidelity, measure_reconstruction
from sae.evaluation.rows import Piece, RowSums, pass_over
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
