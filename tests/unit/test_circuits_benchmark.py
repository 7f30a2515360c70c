"""The benchmark of circuits: which prompts it takes, and how it puts their figures together."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.circuits import CircuitsConfig, _pooled, induction, right_cases
from saescope.errors import InputError


class Guesses:
    """A model that says the token after the last one's first place, if the prompt's sum is even."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        ids = tokens[0].tolist()
        found = torch.zeros(1, len(ids), 20_000)
        if sum(ids) % 2 == 0:
            found[0, -1, ids[ids.index(ids[-1]) + 1]] = 1.0
        return found


def test_prompts_are_those_that_the_model_answers_rightly() -> None:
    model: Any = Guesses()
    cases, drawn = right_cases(model, induction, CircuitsConfig(transcoders="t", prompts=6))
    assert len(cases) == 6 < drawn <= 48
    for ids, right, wrong in cases:
        assert sum(ids) % 2 == 0
        assert ids[ids.index(ids[-1]) + 1] == right != wrong
        assert wrong in ids
        assert (len(ids), len(set(ids))) == (22, 12)
    assert len({tuple(ids) for ids, _, _ in cases}) == 6
    with pytest.raises(InputError, match=r"right on too few prompts.*up to 0"):
        right_cases(model, lambda *_: ([1, 2], 3, 4), CircuitsConfig(transcoders="t", prompts=2))


def test_pooled_shares_count_a_prompt_by_what_changes_in_it() -> None:
    change, shares = np.array([1.0, 3.0, 4.0]), np.array([1.0, 0.0, 0.5])
    row = _pooled("faithfulness, pooled", 5, shares, np.zeros(3), change)
    assert row["mean"] == pytest.approx(3 / 8)
    # by hand: u = (1 - 3/8, 0 - 9/8, 2 - 12/8), and Student's t of two degrees is 4.3027
    spread = (3 / 2 * (0.625**2 + 1.125**2 + 0.5**2)) ** 0.5
    assert row["half"] == pytest.approx(4.3027 * spread / 8, abs=1e-4)
    assert (row["null"], row["null_half"]) == (0, 0)
