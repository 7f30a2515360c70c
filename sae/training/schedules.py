"""The learning rate over a run."""

from saescope.errors import check_range


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
