"""FVU by position, by token and by document, against sums done by hand; shrinkage; densities."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sae
from activations import ActivationStore
from sae.commands.evaluate import EvaluateConfig, evaluate
from sae.data.harvests import split_pieces
from sae.data.placement import placement_of
from sae.evaluation.density import Density, density_histogram
from sae.evaluation.row_groups import Groups, RowGroups
from sae.evaluation.rows import Piece, RowSums, pass_over
from sae.evaluation.shrinkage import Shrinkage
from sae.kernels.codes import SparseCodes
from saescope.config import from_dict
from tests.tiny import make_tiny_harvest, make_tiny_model

D = 3


class Scale:
    """Features are coordinates; a reconstruction is so much of them."""

    d_sae = D

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(x)

    def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
        del like
        return self.factor * codes.dense()


def measured(
    family: type[RowSums], x: Tensor, about: tuple[Tensor | None, ...] = (), size: int = 1000
) -> dict:
    def rows() -> Iterator[Piece]:
        for start in range(0, len(x), size):
            yield Piece(x, x, *about).rows(slice(start, start + size))

    counted, (sums,) = pass_over(Scale(), rows, [family])
    return sums.values(counted)


def some_rows(n: int = 400) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, D, generator=generator) + torch.tensor([3.0, 0.0, 0.0])
    position = torch.randint(1, 20, (n,), generator=generator)
    share = torch.tensor([3e-7, 2e-5, 4e-4, 0.2], dtype=torch.float64)
    token = torch.randint(0, 4, (n,), generator=generator)
    x = x * (1 + token[:, None])
    return x, (torch.arange(n) // 10, position, share[token])


def fvu_of(x: Tensor, chosen: Tensor) -> float:
    exact = x.double()
    error, deviation = (0.5 * exact).square(), (exact - exact.mean(0)).square()
    return float(error[chosen].sum() / deviation[chosen].sum())


def test_each_group_has_its_own_fvu() -> None:
    x, about = some_rows()
    document, position, share = about
    found = measured(RowGroups, x, about)
    assert [(row["from"], row["below"]) for row in found["by_position"]] == [
        (1, 2), (2, 4), (4, 8), (8, 16), (16, 32),
    ]  # fmt: skip
    for row in found["by_position"]:
        chosen = (position >= row["from"]) & (position < row["below"])
        assert row["rows"] == int(chosen.sum())
        assert row["fvu"] == pytest.approx(fvu_of(x, chosen), rel=1e-6)
        assert row["l0"] == D
    by_share = found["by_token_share"]
    assert [row["from"] for row in by_share] == pytest.approx([0, 1e-5, 1e-4, 1e-1])
    assert [row["below"] for row in by_share] == pytest.approx([1e-6, 1e-4, 1e-3, 1.0])
    for row, own in zip(by_share, share.unique(), strict=True):
        assert row["fvu"] == pytest.approx(fvu_of(x, share == own), rel=1e-6)
    assert found["fvu_rare_tokens"] == pytest.approx(fvu_of(x, share < 1e-4), rel=1e-6)
    assert found["fvu_early"] == pytest.approx(fvu_of(x, position < 8), rel=1e-6)
    each = torch.tensor([fvu_of(x, document == n) for n in range(40)], dtype=torch.float64)
    assert found["fvu_document_p90"] == pytest.approx(float(each.quantile(0.9)), rel=1e-6)
    assert found["by_document"]["l0"] == [D, D, D]


def test_its_intervals_are_of_documents() -> None:
    groups = Groups()
    # documents 5, 6 and 7 have errors 1, 4 and 7 over 2, 2 and 4, in two groups
    columns = torch.tensor(
        [[1, 1, 1, 3], [1, 0, 1, 3], [1, 4, 2, 3], [1, 7, 4, 3]], dtype=torch.float64
    )
    document = torch.tensor([5, 5, 6, 7])
    groups.add(torch.tensor([0, 1, 1, 0]), document, columns)
    found = groups.some(lambda group: group >= 0)
    assert (found["rows"], found["l0"], found["fvu"]) == (4, 3, 12 / 8)
    assert found["fvu_interval"] == pytest.approx(4.30265 * math.sqrt(3 / 2 * 6) / 8, rel=1e-5)
    assert groups.table()[0]["fvu"] == 8 / 5


@pytest.mark.parametrize("family", [RowGroups, Shrinkage, Density])
def test_the_size_of_pieces_does_not_matter(family: type[RowSums]) -> None:
    x, about = some_rows()

    def flat(found: object) -> list[float]:
        if isinstance(found, dict):
            return [each for value in found.values() for each in flat(value)]
        if isinstance(found, Tensor):
            return found.tolist()
        if isinstance(found, list):
            return [each for value in found for each in flat(value)]
        return [float(found)]  # type: ignore[arg-type]

    whole, small = (flat(measured(family, x, about, size)) for size in (400, 7))
    assert len(whole) > 3
    assert small == pytest.approx(whole, rel=1e-12)


def test_what_is_not_known_of_rows_is_left_out() -> None:
    x, _ = some_rows()
    found = measured(RowGroups, x)
    names = ("fvu_rare_tokens", "fvu_early", "fvu_document_p90", "fvu_early_interval")
    assert [found[name] for name in names] == [None] * 4
    assert (found["by_position"], found["by_token_share"], found["by_document"]) == ([], [], {})


def test_shrinkage_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 10.0]])
    found = measured(Shrinkage, x)
    # ||x_hat||^2 = 25 / 4, 0, 25; <x_hat, x> = 25 / 2, 0, 50
    assert found["reconstruction_bias"] == pytest.approx(0.5)
    assert found["l2_ratio"] == pytest.approx(0.5)
    assert found["l2_ratio_interval"] == pytest.approx(0)
    assert measured(Shrinkage, torch.zeros(4, D)) == {
        "reconstruction_bias": None,
        "reconstruction_bias_interval": None,
        "l2_ratio": None,
        "l2_ratio_interval": None,
    }


def test_the_bias_is_the_factor_that_makes_reconstructions_best() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, D, dtype=torch.float64)

    class Noisy(Scale):
        def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
            del like
            return 0.7 * codes.dense() + 0.3 * codes.dense().roll(1, dims=1)

    counted, (sums,) = pass_over(Noisy(), lambda: [x], [Shrinkage])
    gamma = sums.values(counted)["reconstruction_bias"]
    x_hat = 0.7 * x + 0.3 * x.roll(1, dims=1)
    factors = torch.linspace(0.3, 2, 3401, dtype=torch.float64)
    errors = torch.stack([(x_hat / factor - x).square().sum() for factor in factors])
    assert gamma == pytest.approx(float(factors[errors.argmin()]), abs=1e-3)


def test_dense_features_and_the_histogram() -> None:
    x = torch.zeros(1000, D)
    x[:100, 0] = 1  # a tenth: not over it
    x[:101, 1] = 1
    found = measured(Density, x)
    assert found["dense_fraction"] == pytest.approx(1 / 3)
    assert found["dead_fraction"] == pytest.approx(1 / 3)
    histogram = found["density_histogram"]
    assert (len(histogram["log10_edges"]), len(histogram["features"])) == (33, 32)
    assert histogram["features"][27:29] == [1, 1]  # up to 10^-1, and above
    every = density_histogram(torch.tensor([1.0, 1e-12, 0.0]))
    assert (every["features"][0], every["features"][-1], sum(every["features"])) == (1, 1, 2)


def test_rows_of_a_harvest_know_their_token(tmp_path: Path) -> None:
    site = "blocks.1.hook_resid_post"
    harvest = make_tiny_harvest(tmp_path, make_tiny_model(tmp_path / "model"))
    settings = {
        "harvest": str(harvest), "out": str(tmp_path / "run"), "trainer": {"batch_size": 64},
        "sae": {"kind": "topk", "d_sae": 48, "k": 4},
    }  # fmt: skip
    sae.train(from_dict(sae.TrainConfig.specialise({}), settings, "test"))
    found = evaluate(EvaluateConfig(run=str(tmp_path / "run"), tokens=0))
    store = ActivationStore.open(harvest)
    pieces = list(
        split_pieces(store, placement_of(sae.load(tmp_path / "run"), site), "held_out", None)()
    )
    tokens, keep = torch.from_numpy(store.tokens[:]), torch.from_numpy(store.keep[:])
    held_out = torch.from_numpy(store.split == 1)[:, None] & keep
    share = torch.cat([each.token_share for each in pieces if each.token_share is not None])
    wanted = [float((tokens[keep] == token).double().mean()) for token in tokens[held_out].tolist()]
    assert share.sort().values.tolist() == pytest.approx(sorted(wanted))
    position = torch.cat([each.position for each in pieces if each.position is not None])
    assert position.sort().values.tolist() == sorted(held_out.nonzero()[:, 1].tolist())
    described = evaluate(
        EvaluateConfig(
            run=str(tmp_path / "run"),
            suite=("description_length",),
            out=str(tmp_path / "bits.json"),
        )
    )
    assert described["protocol"]["description_length"]["training_rows"] == 16_384
    bits = described["description_length"]
    assert 0 < bits["value_bits"] < bits["description_bits"] < 48
    assert bits["fvu_quantised"] == pytest.approx(found["reconstruction"]["fvu"], abs=2e-3)
    table = found["row_groups"]["by_position"]
    assert sum(row["rows"] for row in table) == found["row_groups"]["rows"] == len(share)
    whole = found["reconstruction"]
    spread = sum(row["fvu"] * row["rows"] for row in table) / len(share)
    assert spread == pytest.approx(whole["fvu"], rel=0.2)
