"""The learning rate over a run."""

from typing import NamedTuple

from saescope.errors import InputError, check_range

_LONG = 7500
"""steps of a run that is long enough for the published rule"""
_MOST, _HIGHEST = 8.0, 8e-3
"""what a short run takes at most, of that rule and in all"""


def base_lr(d_sae: int, optimiser: str = "adam") -> float:
    """The peak learning rate for a dictionary's width and an optimiser's kind.

    Adam's kinds: 2e-4 / sqrt(d_sae / 2^14), the rule that Gao et al. 2024 found for TopK
    dictionaries. Signum's kinds, whose every step is as long: 5e-3 / sqrt(d_sae / 2^14), as
    sparsify has it.

    >>> base_lr(2**14), base_lr(2**12), base_lr(2**14, "schedule_free_signum")
    (0.0002, 0.0004, 0.005)
    """
    peak = 5e-3 if optimiser.endswith("signum") else 2e-4
    return peak / (d_sae / 2**14) ** 0.5


def default_lr(d_sae: int, steps: int, optimiser: str = "adam") -> float:
    """The peak learning rate of a run of so many steps, where none is given; two digits of it.

    Adam: base_lr sqrt(7500 / steps) in runs of fewer than 7,500 steps, but no more than 8 base_lr,
    and than 8e-3 (docs/reports/learning_rate.md). The other optimisers, of which nothing of the
    kind was measured: base_lr.

    >>> [default_lr(2**14, steps) for steps in (50, 300, 1000, 10_000)]
    [0.0016, 0.001, 0.00055, 0.0002]
    """
    base = base_lr(d_sae, optimiser)
    lr = base
    if optimiser == "adam" and steps < _LONG:
        lr = max(base, min(_HIGHEST, base * min(_MOST, (_LONG / steps) ** 0.5)))
    return float(f"{lr:.2g}")


class FinishRate(NamedTuple):
    """The learning rate of a run's finish, its last `steps`: `lr` at their start, and 0 after."""

    steps: int = 0
    lr: float = 0.0


def lr_factor(step: int, total: int, *, warmup: int, decay: int) -> float:
    """What the learning rate is multiplied by at a step (0-based).

    Linear from 1/warmup to 1 over the first `warmup` steps, 1, then linear towards 0 over the last
    `decay` steps; the last step still has 1/decay.

    >>> [lr_factor(s, 10, warmup=2, decay=4) for s in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    check_range("lr_factor.step", step, low=0, below=total)
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    down = min(1.0, (total - step) / decay) if decay else 1.0
    return min(up, down)


def steps_in(
    rows: float, rows_per_step: int, batch_size: int, *, where: str = "trainer.batch_size"
) -> int:
    """How many steps the training rows give; InputError if there is not one.

    rows_per_step: of the rows that are counted; fewer than batch_size where each gives several.
    """
    steps = int(rows / rows_per_step)
    if steps < 1:
        raise InputError(
            "fewer training rows than one batch",
            where=where,
            given=batch_size,
            allowed=f"up to {int(rows)}",
        )
    return steps
