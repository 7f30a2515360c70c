"""Planted data are what they say; recovery, its controls and absorption against hand-made cases."""

import itertools

import pytest
import torch

from sae.evaluation.planted import PlantedBatches, PlantedConfig, PlantedDictionary, Structure
from sae.evaluation.recovery import (
    best_assignment,
    by_frequency,
    measure_absorption,
    measure_recovery,
    nonnegative_parts,
    principal_directions,
)
from saescope.errors import InputError

ROWS = 40_000


def planted(structure: Structure = "zipf", **options: float) -> PlantedDictionary:
    return PlantedDictionary(PlantedConfig(structure=structure, **options))  # type: ignore[arg-type]


class TestPlanted:
    @pytest.mark.parametrize("structure", ["zipf", "correlated", "hierarchical"])
    def test_features_fire_as_often_as_they_should(self, structure: Structure) -> None:
        data = planted(structure)
        on = data.sample(ROWS, stream=1).codes > 0
        p = data.frequency.double()
        error = (on.double().mean(0) - p) / (p * (1 - p) / ROWS).sqrt()
        assert float(error.abs().max()) < 4.5  # standard errors, the worst of 64
        assert float(p.sum()) == pytest.approx(3, rel=1e-6)

    def test_frequencies_follow_the_law(self) -> None:
        p = planted(zipf=1.0, active=1.0).frequency
        assert float(p[0] / p[9]) == pytest.approx(10, rel=1e-5)

    def test_pairs_fire_together(self) -> None:
        on = planted("correlated", together=0.7).sample(ROWS, stream=1).codes[:, :8] > 0
        a, b = on[:, 0::2], on[:, 1::2]
        both = (a & b).double().sum(0)
        assert torch.allclose(both / a.sum(0), torch.tensor(0.7).double(), atol=0.03)
        assert torch.allclose(both / b.sum(0), torch.tensor(0.7).double(), atol=0.03)

    def test_no_child_without_its_parent(self) -> None:
        data = planted("hierarchical", children=3, child_probability=0.6)
        on = (data.sample(ROWS, stream=1).codes > 0).view(ROWS, 16, 4)
        parent, children = on[..., 0], on[..., 1:].sum(-1)
        assert not children[~parent].any()
        assert int(children.max()) == 1
        assert float(children[parent].double().mean()) == pytest.approx(0.6, abs=0.01)
        assert data.families[:4].tolist() == [[0, 1], [0, 2], [0, 3], [4, 5]]
        assert not planted().families.numel()

    def test_rows_are_sums_of_directions_with_a_mean_and_noise(self) -> None:
        clean, noisy = planted(offset=3.0, d_out=5), planted(offset=3.0, noise=0.5, d_out=5)
        rows = clean.sample(1000, stream=2)
        fired = rows.codes[rows.codes > 0]
        assert 1 <= float(fired.min()) < 1.01
        assert 1.99 < float(fired.max()) <= 2
        assert float(clean.mean.norm()) == pytest.approx(3, rel=1e-6)
        torch.testing.assert_close(rows.x - clean.mean, rows.codes @ clean.directions)
        assert rows.target is not None
        torch.testing.assert_close(rows.target, rows.codes @ clean.target_directions)
        others = noisy.sample(1000, stream=2)
        assert torch.equal(others.codes, rows.codes)
        assert float((others.x - rows.x).std()) == pytest.approx(0.5, rel=0.02)

    def test_seeds_and_streams_are_exact(self) -> None:
        data, again, other = planted(), planted(), planted(seed=1)
        assert torch.equal(data.sample(50, stream=3).x, again.sample(50, stream=3).x)
        assert not torch.equal(data.sample(50, stream=3).codes, data.sample(50, stream=4).codes)
        assert not torch.equal(data.directions, other.directions)
        through, resumed = PlantedBatches(data, 8), PlantedBatches(again, 8)
        batches = iter(through)
        next(batches)
        resumed.load_state_dict(through.state_dict())
        assert torch.equal(next(iter(resumed)).x, next(batches).x)

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            ({"features": 63, "structure": "correlated"}, "planted.features"),
            ({"active": 40.0}, "planted.active"),
            ({"together": 1.5}, "planted.together"),
            ({"d_in": 0}, "planted.d_in"),
        ],
    )
    def test_bad_configurations_are_named(self, options: dict, field: str) -> None:
        with pytest.raises(InputError, match=field):
            PlantedDictionary(PlantedConfig(**options))


class TestRecovery:
    def test_by_hand(self) -> None:
        directions = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
        rows = torch.tensor([[-2.0, 0.0], [1.2, 1.6]])  # the first and third, one sign turned
        found = measure_recovery(directions, rows)
        assert found.best.tolist() == pytest.approx([1, 0.8, 1])
        assert found.latent.tolist() == [0, 1, 1]
        assert found.mean == pytest.approx(2.8 / 3)
        assert found.found == pytest.approx(2 / 3)
        assert found.matched == pytest.approx(2 / 3)  # two rows serve two directions only

    def test_assignment_is_the_best_of_all(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for rows, columns in [(1, 4), (4, 4), (4, 6), (6, 4)] * 20:
            value = torch.randn(rows, columns, generator=generator)
            value = value.round() if rows == 4 else value  # ties
            chosen = best_assignment(value)
            served = chosen >= 0
            assert len(set(chosen[served].tolist())) == int(served.sum()) == min(rows, columns)
            wide = value if rows <= columns else value.T
            best = max(
                sum(float(wide[row, column]) for row, column in enumerate(order))
                for order in itertools.permutations(range(wide.shape[1]), wide.shape[0])
            )
            assert float(value[served, chosen[served]].sum()) == pytest.approx(best, abs=1e-5)

    def test_parts_by_frequency_begin_with_the_rarest(self) -> None:
        value = torch.tensor([1.0, 2.0, 3.0, 4.0])
        assert by_frequency(value, torch.tensor([0.4, 0.3, 0.2, 0.1]), 2) == [3.5, 1.5]

    def test_bad_input_is_named(self) -> None:
        with pytest.raises(InputError, match="equal width"):
            measure_recovery(torch.ones(2, 3), torch.ones(2, 4))
        with pytest.raises(InputError, match="is 0"):
            measure_recovery(torch.zeros(2, 3), torch.ones(2, 3))
        with pytest.raises(InputError, match="parts"):
            by_frequency(torch.ones(3), torch.ones(3))


class TestControls:
    def test_principal_directions_are_those_of_the_svd(self) -> None:
        x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
        x = x.double()
        _, _, reference = torch.linalg.svd(x - x.mean(0))
        found = principal_directions(x + 100, 4)
        assert found.shape == (4, 6)
        torch.testing.assert_close((found @ reference.T[:, :4]).abs(), torch.eye(4).double())

    def test_nonnegative_parts_of_nonnegative_data(self) -> None:
        """Parts that do not overlap, with rows of one part alone, are found."""
        true = torch.eye(4).repeat_interleave(3, dim=1)
        generator = torch.Generator().manual_seed(0)
        codes = torch.rand(500, 4, generator=generator)
        codes = codes * (torch.rand(500, 4, generator=generator) < 0.5)
        found = nonnegative_parts(codes @ true, 4, steps=300)
        centred = true - true.mean(0)
        assert measure_recovery(centred, found).matched > 0.99


class TestAbsorption:
    """Parent e_1 of amount s, child e_2; latent 0 is the parent's, 1 carries both."""

    directions = torch.eye(3)[:2]
    dictionary = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    codes = torch.tensor([[2.0, 0.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [0.0, 0.0]])
    families = torch.tensor([[0, 1]])

    def measured(self, latents: torch.Tensor, **options: float) -> dict[str, float]:
        absorption = measure_absorption(
            lambda x: latents, self.dictionary, x=self.codes, codes=self.codes,
            directions=self.directions, families=self.families, **options,
        )  # fmt: skip
        return vars(absorption)

    def test_by_hand(self) -> None:
        latents = torch.tensor(
            [
                [2.0, 0.0, 0.0],  # the parent alone: seen
                [0.0, 2.0, 0.0],  # absorbed whole
                [0.0, 0.5, 9.0],  # missed, but what latent 1 carries is 0.25 of it: not absorbed
                [1.0, 1.0, 0.0],  # half and half
                [2.0, 1.0, 0.0],  # the parent's latent carries all of it
                [0.0, 0.0, 0.0],
            ]
        )
        found = self.measured(latents)
        assert found["rate"] == pytest.approx(1 / 4)
        assert found["fraction"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
        assert found["missed"] == pytest.approx(2 / 4)
        assert found["missed_alone"] == 0
        assert found["found"] == 1
        assert self.measured(latents, min_share=0.2)["rate"] == pytest.approx(2 / 4)
        # latent 1 has a cosine of 0.71 with the parent: too little to be its absorber here
        assert self.measured(latents, min_cosine=0.8)["rate"] == 0

    def test_the_true_dictionary_absorbs_nothing(self) -> None:
        data = planted("hierarchical")
        rows = data.sample(4000, stream=1)
        found = measure_absorption(
            lambda x: rows.codes, data.directions, x=rows.x, codes=rows.codes,
            directions=data.directions, families=data.families,
        )  # fmt: skip
        assert vars(found) == {
            "rate": 0, "fraction": pytest.approx(0, abs=1e-6), "missed": 0, "missed_alone": 0,
            "found": 1,
        }  # fmt: skip

    def test_a_dictionary_of_sums_absorbs_every_parent(self) -> None:
        """A latent for each child with its parent, which stands for both where the child is on."""
        data = planted("hierarchical", zipf=0.0)
        rows = data.sample(4000, stream=1)
        dictionary, latents = data.directions.clone(), rows.codes.clone()
        for parent, child in data.families.tolist():
            dictionary[child] += data.directions[parent]
            on = rows.codes[:, child] > 0
            latents[on, child] = rows.codes[on, parent]
            latents[on, parent] = 0
        found = measure_absorption(
            lambda x: latents, dictionary, x=rows.x, codes=rows.codes,
            directions=data.directions, families=data.families,
        )  # fmt: skip
        assert (found.rate, found.missed, found.missed_alone) == (1, 1, 0)
        assert found.fraction == pytest.approx(1)

    def test_bad_input_is_named(self) -> None:
        latents = torch.zeros(6, 3)
        with pytest.raises(InputError, match="there are no"):
            measure_absorption(
                lambda x: latents, self.dictionary, x=self.codes, codes=self.codes,
                directions=self.directions, families=torch.empty(0, 2, dtype=torch.int64),
            )  # fmt: skip
        with pytest.raises(InputError, match="too few rows"):
            measure_absorption(
                lambda x: latents[:1], self.dictionary, x=self.codes[:1], codes=self.codes[:1],
                directions=self.directions, families=self.families,
            )  # fmt: skip
