"""Description length: against the entropy known by design, and against a real arithmetic coder."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from sae.analysis.description_length import Described, at_equal_distortion
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.evaluation.description_length import TOLERANCE, DescriptionLength
from sae.evaluation.planted import PlantedConfig, PlantedDictionary
from sae.evaluation.rows import Counted, Piece, encoded, pass_over
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError

D = 12


class Identity:
    """Features are coordinates."""

    d_sae = D

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(x)

    def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
        del like
        return codes.dense()


def coordinates(rows: int, seed: int) -> Tensor:
    """Coordinate j is not 0 with probability 1 / (j + 2), and then 1, 2, 3 or 4 alike."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(rows, D, generator=generator) < 1 / torch.arange(2, D + 2)
    return on * torch.randint(1, 5, (rows, D), generator=generator).double()


def measured(sae: object, train: Tensor, held_out: Tensor, size: int = 10_000):
    def rows() -> Iterator[Piece]:
        for part in held_out.split(size):
            yield Piece(part, part)

    counted, (found,) = pass_over(
        sae,  # type: ignore[arg-type]
        rows,
        [DescriptionLength],
        training=lambda count: lambda: train[:count].split(3000),
    )
    assert isinstance(found, DescriptionLength)
    return found, found.values(counted)


def test_it_is_the_entropy_that_the_data_have() -> None:
    _, found = measured(Identity(), coordinates(20_000, 0), coordinates(20_000, 1))
    p = 1 / np.arange(2, D + 2)
    index = float((-p * np.log2(p) - (1 - p) * np.log2(1 - p)).sum())
    assert found["index_bits"] == pytest.approx(index, rel=0.01)
    assert found["value_bits"] == pytest.approx(2 * p.sum(), rel=0.01)
    assert found["description_bits"] == pytest.approx(index + 2 * p.sum(), rel=0.01)
    assert found["fvu_quantised"] <= TOLERANCE
    assert found["dictionary_bits"] == 32 * (D + 1) * D


def trained() -> tuple[TopKSAE, PlantedDictionary]:
    """A TopK SAE that has the true directions."""
    planted = PlantedDictionary(PlantedConfig(d_in=24, features=32, active=2, offset=0.0))
    sae = TopKSAE(TopKConfig(d_sae=32, k=3), 24)
    with torch.no_grad():
        sae.W_dec.copy_(planted.directions)
        sae.W_enc_T.copy_(planted.directions)
    return sae, planted


def test_within_two_percent_of_an_arithmetic_coder() -> None:
    sae, planted = trained()
    train, held_out = (planted.sample(rows, stream=n).x for n, rows in ((0, 12_000), (1, 6_000)))
    sums, found = measured(sae, train, held_out)
    model = sums.distribution
    codes = sae.encode_sparse(held_out).compact()
    fires = (codes.dense() != 0).int().numpy()
    symbols = model.number(model.symbols(codes))
    coder = stream.queue.RangeEncoder()
    bernoulli = stream.model.Bernoulli(perfect=False)
    for feature in range(sae.d_sae):
        column = np.ascontiguousarray(fires[:, feature], dtype=np.int32)
        coder.encode(column, bernoulli, np.full(len(column), float(model.rate[feature])))
    index_bits = 32 * len(coder.get_compressed()) / len(held_out)
    alphabet = torch.arange(len(model.shared))
    for feature in range(sae.d_sae):
        own = symbols[codes.index == feature].numpy().astype(np.int32)
        every = torch.full_like(alphabet, feature)
        shifted = alphabet + model.low - (1 << 19)
        probabilities = model.value_probability(every, shifted).numpy()
        assert probabilities.sum() == pytest.approx(1)
        coder.encode(own, stream.model.Categorical(probabilities, perfect=False))
    bits = 32 * len(coder.get_compressed()) / len(held_out)
    assert found["index_bits"] == pytest.approx(index_bits, rel=0.02)
    assert found["description_bits"] == pytest.approx(bits, rel=0.02)
    assert 0 < found["value_bits"] < found["description_bits"]


def test_quantising_hardly_changes_the_reconstruction() -> None:
    sae, planted = trained()
    train, held_out = (planted.sample(4000, stream=n).x for n in (0, 1))
    sums, found = measured(sae, train, held_out)
    x_hat = sae(held_out).x_hat.detach().double()
    exact = held_out.double()
    deviation = (exact - exact.mean(0)).square().sum()
    fvu = float((exact - x_hat).square().sum() / deviation)
    assert 0 < found["fvu_quantised"] - fvu <= 2 * TOLERANCE
    # twice the step would be too coarse
    sums.distribution.step *= 2
    received = sae.decode(sums.distribution.quantised(sae.encode_sparse(held_out))).detach()
    assert float((exact - received.double()).square().sum() / deviation) > fvu + TOLERANCE


def test_a_world_that_changed_is_not_described() -> None:
    """Held-out values far from those that the step was chosen for are cut off: no result."""
    sae, planted = trained()
    train, held_out = (planted.sample(2000, stream=n).x for n in (0, 1))
    sums, _ = measured(sae, train, held_out)
    sums.distribution.step *= 30
    sums.rows = [torch.zeros(0, 5, dtype=torch.float64)]
    with torch.no_grad():
        sums.add(encoded(sae, Piece(held_out, held_out)))
    found = sums.values(Counted(rows=len(held_out), document=None))
    assert found["description_bits"] is None
    assert found["fvu_quantised"] > 0.01


def test_batches_do_not_matter_and_held_out_costs_more_than_training() -> None:
    sae, planted = trained()
    train, held_out = (planted.sample(rows, stream=n).x for n, rows in ((0, 400), (1, 3000)))
    _, whole = measured(sae, train, held_out)
    _, small = measured(sae, train, held_out, size=50)
    for name in ("description_bits", "index_bits", "value_bits", "fvu_quantised"):
        assert small[name] == pytest.approx(whole[name], rel=1e-6)
    _, cheat = measured(sae, held_out[:400], held_out[:400])
    _, fair = measured(sae, train, held_out[:400])
    assert fair["description_bits"] > cheat["description_bits"]


def test_a_dictionary_of_nothing_takes_no_bits() -> None:
    class Silent(Identity):
        def encode_sparse(self, x: Tensor) -> SparseCodes:
            return SparseCodes.none(x, D)

    x = coordinates(3000, 0)
    _, found = measured(Silent(), x, x)
    assert found["value_bits"] == 0
    assert 0 < found["index_bits"] < 0.01


def test_training_rows_are_needed() -> None:
    with pytest.raises(InputError, match="DescriptionLength: needs rows of the training split"):
        pass_over(Identity(), lambda: [coordinates(9, 0)], [DescriptionLength])


def test_widths_are_compared_at_one_distortion() -> None:
    # bits at FVU 0.25: width 8 is between (0.2, 40) and (0.3, 20); 16 between (0.1, 30), (0.4, 15)
    saes = [
        Described(d_sae=8, l0=4, fvu=0.2, bits=40),
        Described(d_sae=8, l0=2, fvu=0.3, bits=20),
        Described(d_sae=16, l0=4, fvu=0.1, bits=30),
        Described(d_sae=16, l0=1, fvu=0.4, bits=15),
        Described(d_sae=32, l0=1, fvu=0.26, bits=1),
    ]
    found = at_equal_distortion(saes, 0.25)
    assert found.bits == pytest.approx({8: 30.0, 16: 22.5})
    assert found.l0 == pytest.approx({8: 3.0, 16: 2.5})
    assert found.d_sae == 16
    assert at_equal_distortion(saes).fvu == 0.26
    assert at_equal_distortion(saes).d_sae == 32
    with pytest.raises(InputError, match="no width has SAEs on both sides of it"):
        at_equal_distortion(saes, 0.01)
    with pytest.raises(InputError, match="no SAEs"):
        at_equal_distortion([])
    assert found.fvu == 0.25
