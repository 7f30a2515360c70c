"""95% intervals with documents as the unit: by hand, against simulated truth, and where too few."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.evaluation import families
from sae.evaluation.downstream import _summarise
from sae.evaluation.intervals import by_cluster, half_width, t_quantile
from sae.evaluation.reconstruction import measure_reconstruction, pool
from sae.evaluation.rows import Piece, pass_over
from sae.evaluation.written import report
from sae.kernels.codes import SparseCodes


@pytest.mark.parametrize(
    ("degrees", "t"),
    [
        # any table of Student's law, two-sided 95%
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (10, 2.2281),
        (49, 2.0096),
        (120, 1.9799),
        (1000, 1.9623),
        (1001, 1.9623),
        (10**7, 1.95996),
    ],
)
def test_t_quantile(degrees: int, t: float) -> None:
    assert t_quantile(degrees) == pytest.approx(t, abs=6e-5)
    assert t_quantile(degrees, 0.5) < t_quantile(degrees, 0.9) < t_quantile(degrees)


def test_half_width_by_hand() -> None:
    # A = (1, 4, 7), B = (2, 2, 4): R = 12 / 8, u = (-2, 1, 1), sum u^2 = 6
    found = half_width(torch.tensor([1.0, 4.0, 7.0]), torch.tensor([2.0, 2.0, 4.0]))
    assert found == pytest.approx(4.30265 * math.sqrt(3 / 2 * 6) / 8, rel=1e-5)
    # equal sizes: t times the standard error of a mean
    means = torch.tensor([0.3, 0.7, 0.2, 0.9], dtype=torch.float64)
    error = float(means.std()) / 2
    assert half_width(means, torch.ones(4)) == pytest.approx(3.18245 * error, rel=1e-5)


def test_of_one_cluster_nothing_is_known() -> None:
    assert half_width(torch.tensor([1.0]), torch.tensor([2.0])) is None
    assert half_width(torch.tensor([]), torch.tensor([])) is None
    assert half_width(torch.ones(2), torch.ones(2)) == 0


def test_rows_of_a_cluster_are_added_up_wherever_they_stand() -> None:
    values, cluster = torch.arange(6.0), torch.tensor([5, -3, 5, 9, -3, 5])
    assert by_cluster(values, cluster).tolist() == [5, 7, 3]


def correlated(documents: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows' error, variance and document; two thirds of their spread is the document's."""
    sizes = torch.randint(10, 40, (documents,), generator=generator)
    cluster = torch.arange(documents).repeat_interleave(sizes)
    own = torch.randn(documents, 2, generator=generator)[cluster]
    each = torch.randn(len(cluster), 2, generator=generator)
    spread = 0.2 * (math.sqrt(2) * own + each) / math.sqrt(3)
    variance = 1 + spread[:, 0]
    return 0.3 * variance + 0.3 * spread[:, 1], variance, cluster


@pytest.mark.parametrize("documents", [2, 3, 10, 50])
def test_it_covers_the_truth_as_often_as_it_says(documents: int) -> None:
    """Rows alike within documents; with rows as the unit it would cover half of the time."""
    generator = torch.Generator().manual_seed(documents)
    covered = by_rows = 0
    trials = 2000
    for _ in range(trials):
        error, variance, cluster = correlated(documents, generator)
        off = abs(float(error.sum() / variance.sum()) - 0.3)
        half = half_width(by_cluster(error, cluster), by_cluster(variance, cluster))
        naive = half_width(error, variance)
        assert half is not None
        assert naive is not None
        covered, by_rows = covered + (off < half), by_rows + (off < naive)
    assert 0.935 < covered / trials < 0.965
    assert by_rows / trials < 0.6


def test_it_is_what_a_bootstrap_over_documents_would_give() -> None:
    """The closed form has no seed, and is exact in memory that grows with documents alone."""
    generator = torch.Generator().manual_seed(0)
    error, variance, cluster = correlated(200, generator)
    above, below = by_cluster(error, cluster), by_cluster(variance, cluster)
    drawn = torch.randint(200, (4000, 200), generator=generator)
    ratios = above[drawn].sum(1) / below[drawn].sum(1)
    half = half_width(above, below)
    assert half == pytest.approx(t_quantile(199) * float(ratios.std()), rel=0.05)


class Shrink:
    """Features are coordinates; reconstructs a part of them."""

    d_sae = 4

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(x)

    def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
        del like
        return 0.9 * codes.dense()


def test_fvu_of_documents() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 4) + 2 * torch.randn(30, 4).repeat_interleave(10, 0)
    document = torch.arange(30).repeat_interleave(10)
    order = torch.randperm(300)

    def pieces() -> Iterator[Piece]:
        for part in order.split(70):
            yield Piece(x[part], x[part], document[part])

    found = measure_reconstruction(Shrink(), pieces)
    exact = x.double()
    error = (0.1 * exact).square().sum(1).view(30, 10).sum(1)
    variance = (exact - exact.mean(0)).square().sum(1).view(30, 10).sum(1)
    beyond = error - error.sum() / variance.sum() * variance
    wanted = 2.04523 * float((30 / 29 * beyond.square().sum()).sqrt() / variance.sum())
    assert found.documents == 30
    assert found.fvu_interval == pytest.approx(wanted, rel=1e-5)
    rows = measure_reconstruction(Shrink(), lambda: [x])
    assert rows.documents is None
    assert rows.fvu == pytest.approx(found.fvu)
    assert rows.fvu_interval is not None
    assert found.fvu_interval is not None
    assert rows.fvu_interval < 0.6 * found.fvu_interval


def test_rows_of_one_document_have_no_interval() -> None:
    x = torch.randn(50, 4)
    one = measure_reconstruction(Shrink(), lambda: [Piece(x, x, torch.full((50,), 7))])
    assert (one.documents, one.fvu_interval) == (1, None)
    both = pool({"a": one, "b": measure_reconstruction(Shrink(), lambda: [x])})
    assert both.fvu_interval is None


def test_delta_ce_of_documents() -> None:
    values = {name: torch.zeros(6, dtype=torch.float64) for name in ("clean", "zero", "mean")}
    values["sae"] = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    values["kl"] = 2 * values["sae"]
    unit = torch.tensor([8, 8, 9, 9, 9, 8])
    found = _summarise(values, unit, documented=True)
    # A = (8, 4) over B = (3, 3): R = 2, u = (2, -2)
    assert (found.tokens, found.documents, found.delta_ce) == (6, 2, 2.0)
    assert found.delta_ce_interval == pytest.approx(12.7062 * math.sqrt(2 * 8) / 6, rel=1e-5)
    assert found.kl_interval == pytest.approx(2 * 12.7062 * math.sqrt(2 * 8) / 6, rel=1e-5)
    one = _summarise(values, torch.zeros(6), documented=True)
    assert (one.delta_ce, one.delta_ce_interval, one.kl_interval) == (2.0, None, None)


def test_l0_cosine_and_norm_ratio_of_documents() -> None:
    # documents of two rows each; a row is halved where its second coordinate is 1
    x = torch.tensor([[2.0, 0.0], [1.0, 1.0], [3.0, 0.0], [0.0, 1.0], [4.0, 1.0], [6.0, 0.0]])
    document = torch.tensor([4, 4, 7, 7, 9, 9])

    class Uneven(Shrink):
        d_sae = 2

        def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
            return torch.where(like[:, 1:] == 1, like * torch.tensor([1.0, 0.0]), 0.5 * like)

    found = measure_reconstruction(Uneven(), lambda: [Piece(x, x, document)])
    # active: 1 and 2, 1 and 1, 2 and 1
    assert (found.l0, found.documents) == (pytest.approx(8 / 6), 3)
    u = torch.tensor([3.0, 2.0, 3.0]) - 2 * found.l0
    expected = 4.30265 * math.sqrt(3 / 2 * float(u.square().sum())) / 6
    assert found.l0_interval == pytest.approx(expected, rel=1e-5)
    # the fourth row is reconstructed as 0, and has no cosine
    cosine = torch.tensor([1 + 1 / math.sqrt(2), 1.0, 4 / math.sqrt(17) + 1])
    directed = torch.tensor([2.0, 1.0, 2.0])
    assert found.cosine == pytest.approx(float(cosine.sum()) / 5)
    assert found.cosine_interval == pytest.approx(half_width(cosine, directed))
    norm_in = torch.tensor([2 + math.sqrt(2), 4.0, math.sqrt(17) + 6])
    norm_out = torch.tensor([1.0 + 1.0, 1.5, 4.0 + 3.0])
    assert found.norm_ratio == pytest.approx(float(norm_out.sum() / norm_in.sum()))
    assert found.norm_ratio_interval == pytest.approx(half_width(norm_out, norm_in))


def test_what_is_recovered_of_documents() -> None:
    """A ratio of the harm undone to the harm done, by documents; each loss alone is a mean."""
    values = {
        "clean": torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64),
        "sae": torch.tensor([2.0, 1.0, 2.0, 4.0], dtype=torch.float64),
        "zero": torch.tensor([9.0, 7.0, 6.0, 8.0], dtype=torch.float64),
        "mean": torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64),  # does no harm
        "kl": torch.zeros(4, dtype=torch.float64),
    }
    found = _summarise(values, torch.tensor([0, 0, 1, 1]), documented=True)
    # undone 13 and 8 of harm 14 and 10
    assert found.recovered_zero == pytest.approx(21 / 24)
    expected = half_width(torch.tensor([13.0, 8.0]), torch.tensor([14.0, 10.0]))
    assert found.recovered_zero_interval == pytest.approx(expected)
    assert (found.recovered_mean, found.recovered_mean_interval) == (None, None)
    assert found.ce_interval == pytest.approx(
        half_width(torch.tensor([3.0, 6.0]), torch.tensor([2.0, 2.0]))
    )
    assert found.ce_clean_interval == pytest.approx(12.7062 * math.sqrt(2 * 2) / 4, rel=1e-5)


def test_a_metric_that_says_so_has_an_interval() -> None:
    """And no other has: what its table says is what is measured."""
    torch.manual_seed(0)
    sae = TopKSAE(TopKConfig(d_sae=12, k=2), 6)
    x = torch.randn(90, 6)
    where = torch.arange(90)
    share = torch.full((90,), 1e-5, dtype=torch.float64)
    piece = Piece(x, x, where // 9, where % 9, share)
    chosen = [each for each in families().values() if each.needs == "activations"]
    counted, sums = pass_over(
        sae,
        lambda: [piece],
        [each.measure for each in chosen],
        training=lambda count: lambda: [x[:count]],
    )
    losses = {name: torch.rand(90).double() for name in ("clean", "sae", "kl", "zero", "mean")}
    of_model = vars(_summarise(losses, where // 9, documented=True))
    values = [*(one.values(counted) for one in sums), of_model]
    for family, found in zip([*chosen, families()["downstream"]], values, strict=True):
        for row in family.metrics:
            assert row.name in found
            assert (f"{row.name}_interval" in found) == row.interval, row.name
            if row.interval and found[row.name] is not None:
                assert found[f"{row.name}_interval"] >= 0, row.name


def test_the_report_says_where_documents_are_too_few() -> None:
    values = {"l0": 3.0, "cosine": 0.9, "norm_ratio": 1.0, "dead_fraction": 0.0, "fvu_by_site": {}}
    found = {"rows": 9, "documents": 1, "fvu": 0.5, "fvu_interval": None, **values}
    names = ("ce_clean", "ce", "ce_mean", "ce_zero", "delta_ce", "kl")
    downstream = {
        "tokens": 9,
        "documents": 1,
        **dict.fromkeys(names, 1.0),
        "delta_ce_interval": None,
        "kl_interval": 0.25,
        "recovered_mean": None,
        "recovered_zero": 0.5,
    }
    lines = report(
        {
            "reconstruction": found,
            "downstream": downstream,
            "protocol_hash": "0" * 64,
        }
    )
    assert lines == [
        "on 9 held-out activations of 1 documents (protocol 000000000000; ± is half of a 95% "
        "interval, documents as the unit):",
        "  L0                   3.00 features a row",
        "  FVU                  0.5000 ± unknown: too few documents",
        "  cosine               0.9000",
        "  norm ratio           1.0000",
        "  never fired          0.0% of features",
        "on 9 held-out tokens of 1 documents:",
        "  CE clean             1.0000 nats",
        "  CE with the SAE      1.0000 nats",
        "  CE mean-ablated      1.0000 nats",
        "  CE zero-ablated      1.0000 nats",
        "  delta CE             1.0000 nats ± unknown: too few documents",
        "  KL                   1.0000 ± 0.2500 nats",
        "  CE recovered (mean)  undefined: ablation does no harm",
        "  CE recovered (zero)  50.00%",
    ]
