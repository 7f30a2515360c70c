"""Dense embeddings made shorter: principal, random and Matryoshka directions."""

import pytest
import torch
from torch.nn import functional

from sae.analysis.projections import matryoshka, principal, random_directions
from saescope.errors import InputError


def rows(seed: int = 0) -> torch.Tensor:
    """Two directions say how rows are alike, a third one has more variance and says nothing."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 10, generator=draw)
    return x * torch.tensor([3.0, 2.0, 1.0] + [0.1] * 7) + 5


def test_principal_components_are_those_of_the_singular_values() -> None:
    x = rows()
    found = principal(x, 3)
    axes = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False).Vh[:3]
    cosines = (found.directions.T.double() * axes).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found.first(x, 2), (x - x.mean(0)) @ found.directions[:, :2])


def test_random_directions_are_the_seeds() -> None:
    x = rows()
    assert torch.equal(
        random_directions(x, 4, seed=1).directions, random_directions(x, 4, seed=1).directions
    )
    first = random_directions(x, 4, seed=1).first(x, 4)
    assert not torch.allclose(first, random_directions(x, 4, seed=2).first(x, 4))


def test_matryoshka_prefixes_keep_cosines_better_than_principal_components() -> None:
    x = rows()
    whole = functional.normalize(x - x.mean(0), dim=1)
    learned, start = matryoshka(x, (3, 5), seed=0), principal(x, 5)

    def gap(prefix: torch.Tensor) -> float:
        short = functional.normalize(prefix, dim=1)
        return float((short @ short.T - whole @ whole.T).square().mean())

    for m in (3, 5):
        assert gap(learned.first(x, m)) < gap(start.first(x, m))
    again = matryoshka(x, (3, 5), seed=0)
    assert torch.equal(learned.directions, again.directions)


def test_wrong_input() -> None:
    x = rows()
    with pytest.raises(InputError, match="widths must rise"):
        matryoshka(x, (4, 4), seed=0)
    with pytest.raises(InputError, match="widths must rise"):
        matryoshka(x, (), seed=0)
    with pytest.raises(InputError, match=r"projection\.width"):
        principal(x, 11)
    with pytest.raises(InputError, match=r"projection\.first"):
        principal(x, 3).first(x, 4)
