"""What SAELens is given beside ours on a world, and at which learning rates long runs are made."""

from typing import Any

import pytest

from benchmarks.learning_rate import grid
from benchmarks.synth import SynthBenchmark, _schedule
from sae.training.schedules import default_lr

PROTOCOL: dict[str, Any] = {
    "d_sae": 512,
    "trainer": {"lr": None, "warmup_fraction": 0.05, "decay_fraction": 0.2},
}


def test_saelens_is_given_the_published_rate_or_that_of_ours() -> None:
    published = _schedule(SynthBenchmark(), PROTOCOL, 600)
    assert published == {"lr": 0.0, "warmup_steps": 0, "decay_steps": 0}
    ours = _schedule(SynthBenchmark(schedule="ours"), PROTOCOL, 600)
    assert ours == {"lr": default_lr(512, 600), "warmup_steps": 30, "decay_steps": 120}
    given = {**PROTOCOL, "trainer": {**PROTOCOL["trainer"], "lr": 0.5}}
    assert _schedule(SynthBenchmark(schedule="ours"), given, 600)["lr"] == 0.5


@pytest.mark.parametrize("steps", [10_000, 30_000])
def test_long_runs_are_made_at_the_rule_and_on_either_side_of_it(steps: int) -> None:
    rule = default_lr(512, steps)
    found = {cell.lr for cell in grid() if (cell.kind, cell.steps) == ("topk", steps)}
    assert found == {rule / 2, rule, 2 * rule}
