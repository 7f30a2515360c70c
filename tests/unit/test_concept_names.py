"""Names of directions by the nearest word, and the null that tells which are names."""

import pytest
import torch
from torch.nn import functional

from sae.analysis.concept_names import like_rows, name_directions
from saescope.errors import InputError

WORDS = torch.eye(4, 6) + 3  # the mean of all words is no concept


def test_a_name_is_the_nearest_word_less_the_mean() -> None:
    centred = WORDS - WORDS.mean(0)
    directions = torch.stack([2 * centred[2], -centred[0]])
    null = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    found = name_directions(directions, WORDS, null)
    assert found.word[0] == 2
    assert float(found.cosine[0]) == pytest.approx(1)
    # away from word 0 all others are equally near: cos = 1/3 of centred unit vectors
    assert float(found.cosine[1]) == pytest.approx(1 / 3)
    assert found.named.tolist() == [True, False]


def test_as_many_of_the_null_are_named_as_was_asked() -> None:
    draw = torch.Generator().manual_seed(0)
    words, rows = torch.randn(50, 8, generator=draw), torch.randn(300, 8, generator=draw)
    null = like_rows(rows, 1000, seed=0)
    assert int(name_directions(null, words, null, share=0.05).named.sum()) == 50
    others = like_rows(rows, 1000, seed=1)
    assert 20 < int(name_directions(others, words, null, share=0.05).named.sum()) < 90


def test_random_directions_vary_as_rows_do() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 3, generator=draw) * torch.tensor([5.0, 1.0, 0.0]) + 7
    found = like_rows(rows, 2000, seed=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2000))
    assert not found[:, 2].abs().max() > 1e-5
    assert float((found[:, 0].abs() > found[:, 1].abs()).float().mean()) > 0.8
    assert torch.equal(found, like_rows(rows, 2000, seed=0))
    assert functional.cosine_similarity(found[:1], like_rows(rows, 1, seed=1)).abs() < 1


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="another width"):
        name_directions(torch.ones(2, 5), WORDS, torch.ones(2, 6))
    with pytest.raises(InputError, match=r"\.words"):
        name_directions(torch.ones(2, 6), WORDS[:1], torch.ones(2, 6))
    with pytest.raises(InputError, match=r"\.null"):
        name_directions(torch.ones(2, 6), WORDS, torch.ones(0, 6))
    with pytest.raises(InputError, match=r"\.share"):
        name_directions(torch.ones(2, 6), WORDS, torch.ones(2, 6), share=1)
