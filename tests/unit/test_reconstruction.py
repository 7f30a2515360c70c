"""Reconstruction metrics: the identity, the mean, and a case worked out by hand."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sae.evaluation import families
from sae.evaluation.reconstruction import measure_reconstruction, pool
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError
from saescope.metrics import described, metric_table

D = 5


def rows(offset: float = 0.0, n: int = 3000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, D, generator=generator) * torch.arange(1.0, D + 1) + offset


class Identity:
    """Every dimension is its own feature."""

    d_sae = D

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(x)

    def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
        del like
        return codes.dense()


class Constant:
    """Predicts one vector, with no feature."""

    d_sae = D

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(torch.zeros_like(x))

    def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
        del like
        return self.value.expand(codes.batch, D)


@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_identity_and_mean(offset: float) -> None:
    """A large mean must not flatter the score, as a variance about zero would."""
    x = rows(offset)
    identity = measure_reconstruction(Identity(), lambda: iter([x]))
    assert identity.fvu == 0
    assert identity.cosine == pytest.approx(1)
    assert identity.norm_ratio == pytest.approx(1)
    assert identity.l0 == D
    assert identity.dead_fraction == 0
    mean = measure_reconstruction(Constant(x.double().mean(0)), lambda: iter([x]))
    assert mean.fvu == pytest.approx(1, abs=1e-9)
    assert mean.l0 == 0
    assert mean.dead_fraction == 1


def test_by_hand() -> None:
    class Half(Identity):
        d_sae = 2

        def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
            del like
            return codes.dense() * torch.tensor([0.5, 1.0])

    x = torch.tensor([[2.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
    # mean (2, 8/3); ||x - mu||^2 = 64/9, 4 + 16/9, 4 + 16/9: 168/9; errors (1,0), (0,0), (2,0)
    found = measure_reconstruction(Half(), lambda: iter([x]))
    assert found.rows == 3
    assert found.fvu == pytest.approx(5 / (168 / 9))
    assert found.l0 == pytest.approx(4 / 3)
    assert found.cosine == pytest.approx((1 + 1 + (8 + 16) / (32**0.5 * 20**0.5)) / 3)
    assert found.norm_ratio == pytest.approx((1 + 4 + 20**0.5) / (2 + 4 + 32**0.5))
    assert found.density.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert found.dead_fraction == 0
    silent = measure_reconstruction(Half(), lambda: iter([x * torch.tensor([1.0, 0.0])]))
    assert silent.dead_fraction == 1 / 2


def test_every_metric_of_the_table_is_of_one_family() -> None:
    rows = [row.name for family in families().values() for row in family.metrics]
    assert len(set(rows)) == len(rows)
    # others declare rows for results that are no family's
    assert {row["name"] for row in described(metric_table())} | set(rows) == set(metric_table())


def test_against_a_target_of_another_width() -> None:
    """A transcoder is scored on what it predicts, about that one's mean."""

    class Sum(Identity):
        def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
            assert len(like) == codes.batch
            return codes.dense().sum(1, keepdim=True)

    x = rows(200.0)
    generator = torch.Generator().manual_seed(1)
    target = x.sum(1, keepdim=True) + 3 * torch.randn(len(x), 1, generator=generator)

    def fresh() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(x.split(700), target.split(700), strict=True)

    found = measure_reconstruction(Sum(), fresh)
    error, exact = (target - x.sum(1, keepdim=True)).double(), target.double()
    fvu = error.square().sum() / (exact - exact.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(fvu), rel=1e-4)
    assert found.rows == len(x)
    assert found.cosine == pytest.approx(1)
    swapped = measure_reconstruction(Sum(), lambda: iter([(x, x.sum(1, keepdim=True))]))
    assert swapped.fvu == pytest.approx(0, abs=1e-9)


def test_each_site_of_several_side_by_side() -> None:
    class Drop(Identity):
        def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
            del like
            dense = codes.dense()
            dense[:, 1] = 0
            return dense

    x = rows()
    x[:, 0] *= 1000  # a loud site hides the others in the whole
    sites = {"loud": slice(0, 1), "quiet": slice(1, 3), "exact": slice(3, 5)}
    found = measure_reconstruction(Drop(), lambda: iter(x.split(1000)), columns=sites)
    mean = x.double().mean(0)
    spread = (x.double() - mean).square().sum(0)
    lost = x[:, 1].double().square().sum()
    assert found.fvu_by_site["loud"] == found.fvu_by_site["exact"] == 0
    assert found.fvu_by_site["quiet"] == pytest.approx(float(lost / spread[1:3].sum()))
    assert found.fvu == pytest.approx(float(lost / spread.sum()))
    assert found.fvu < 1e-4


def test_layers_pooled() -> None:
    """Means over layers, however loud a layer is; dead is what fires at none."""

    class First(Identity):
        def encode_sparse(self, x: Tensor) -> SparseCodes:
            return SparseCodes.from_dense(x * torch.tensor([1.0, 0, 0, 0, 0]))

    class Second(Identity):
        def encode_sparse(self, x: Tensor) -> SparseCodes:
            return SparseCodes.from_dense(x * torch.tensor([0.0, 1, 1, 0, 0]))

    x = rows()
    layers = {
        "0": measure_reconstruction(First(), lambda: iter([x])),
        "1": measure_reconstruction(Second(), lambda: iter([1000 * x])),
    }
    pooled = pool(layers)
    assert pooled.fvu == pytest.approx((layers["0"].fvu + layers["1"].fvu) / 2)
    assert pooled.fvu_by_site == {"0": layers["0"].fvu, "1": layers["1"].fvu}
    assert pooled.l0 == 1.5
    assert (layers["0"].dead_fraction, layers["1"].dead_fraction) == (0.8, 0.6)
    assert pooled.dead_fraction == 0.4
    assert pooled.rows == 6000
    assert pooled.density.tolist() == [0.5, 0.5, 0.5, 0, 0]


def test_batch_size_does_not_matter() -> None:
    x = rows(3.0)

    class Noisy(Identity):
        def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
            del like
            return codes.dense() * 0.9

    def split(size: int):
        def fresh() -> Iterator[Tensor]:
            return iter(x.split(size))

        return measure_reconstruction(Noisy(), fresh)

    whole, small = split(3000), split(7)
    assert small.fvu == pytest.approx(whole.fvu, rel=1e-12)
    assert small.fvu_interval == pytest.approx(whole.fvu_interval, rel=1e-12)


def test_interval_covers() -> None:
    """Over many samples the interval holds the truth about 95 times in 100."""
    generator = torch.Generator().manual_seed(0)

    class Drop(Identity):
        def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
            del like
            dense = codes.dense()
            dense[:, -1] = 0
            return dense

    truth = 25 / 55  # the last dimension's share of the variance
    covered = 0
    for _ in range(200):
        x = torch.randn(400, D, generator=generator) * torch.arange(1.0, D + 1)
        found = measure_reconstruction(Drop(), lambda x=x: iter([x]))
        assert found.fvu_interval is not None
        covered += abs(found.fvu - truth) < found.fvu_interval
    assert 180 <= covered <= 198


def test_nothing_to_measure() -> None:
    with pytest.raises(InputError, match="no activations"):
        measure_reconstruction(Identity(), lambda: iter([]))
    with pytest.raises(InputError, match="FVU is undefined"):
        measure_reconstruction(Identity(), lambda: iter([torch.ones(4, D)]))


def test_rows_that_are_equal_but_for_rounding_have_no_fvu() -> None:
    x = torch.full((100, D), 0.1) * (1 + 1e-7 * torch.randn(100, D))
    assert x.unique().numel() > 1
    with pytest.raises(InputError, match="but for rounding, so FVU is undefined"):
        measure_reconstruction(Identity(), lambda: iter([x]))
    with pytest.raises(InputError, match="rows of activations that are not finite"):
        measure_reconstruction(Identity(), lambda: iter([x, x / 0]))
