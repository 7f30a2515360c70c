"""What a long run wants, from short ones: its L0, learning rate, width, tokens and time.

* L0: by factors of 2, then of sqrt(2). Where FVU bends (`bend`) each further active feature begins
  to explain less; on data whose L0 is known that is near it (benchmarks/results/advise.csv). If it
  bends nowhere, where the decoder's directions are least alike (`sae.evaluation.geometry`; Chanin
  and Garriga-Alonso 2025, arXiv 2508.16560): the smallest L0 within 0.2% of the least. In runs this
  short, or with fewer features than the data have, these are often the less alike the higher L0 is;
  then nothing is known, and the L0 stays that which the search began with.
* Learning rate: half and twice what a run of this length takes by itself are tried; the factor that
  wins is kept in the long run.
* Width: half and twice as many features are tried, at this L0; the widest counts whose FVU is lower
  by 2% than that of half as many, and of whose features no more than a fifth are dead.
* Tokens: a quarter and half of the steps are tried; what each doubling gains falls by a factor,
  which says after how many doublings one gains less than 1%.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from activations import ActivationStore
from sae.training.schedules import default_lr
from sae.training.short_runs import Measured, Setting, ShortRuns, passes_of

_ALIKE = 2e-3
"""similarities that differ by no more than this fraction are taken for equal"""
_WORTH, _MOST_DEAD = 0.02, 0.2
_DOUBLING = 0.01
"""twice as many tokens are worth it if FVU falls by this fraction"""
_SLOWEST = 0.9
"""a doubling is taken to gain no more than so much of what the one before gained"""
_MOST_PASSES = 10
"""over a harvest: more is training on what is known"""
_FLATTER = 0.75
"""a slope of no more than so much of the one before is a bend"""
_LOWER = 2
"""how often half of the lowest L0 is tried, where it is the best"""


L0From = Literal["similarity", "bend", "start"]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the long run should be given."""

    target_l0: float
    l0_from: L0From
    """what says so: the bend of FVU, the least decoder similarity, or nothing: it was given"""
    lr: float
    d_sae: int
    steps: int
    tokens: int
    seconds: float
    """that it takes on this machine"""
    limit: str
    """what set the number of tokens: gain, time or harvest"""
    measured: tuple[Measured, ...]
    """the short runs behind it, in their order"""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def advise(runs: ShortRuns, *, start: float, hours: float) -> Advice:
    """Make short runs, and say what they mean for a run of at most so many hours.

    Args: start, the L0 that the search begins with.
    """
    config, steps, d_sae = runs.config, runs.steps, runs.config.sae.d_sae

    def at(l0: float, width: int = d_sae, factor: float = 1.0, length: int = steps) -> Setting:
        return Setting(target_l0=l0, d_sae=width, steps=length, lr_factor=factor)

    l0, told = best_l0(lambda value: runs.measure(at(value)), start, highest=d_sae / 4)
    factor = factor_of([runs.measure(at(l0, factor=each)) for each in (1.0, 0.5, 2.0)])
    widths = [runs.measure(at(l0, width, factor)) for width in (d_sae // 2, d_sae, 2 * d_sae)]
    lengths = [runs.measure(at(l0, d_sae, factor, steps // part)) for part in (4, 2, 1)]
    chosen = best_width([each for each in widths if each])
    wanted = steps * 2 ** doublings([each.fvu for each in lengths if each])
    a_step = chosen.seconds / chosen.steps
    most = {"gain": wanted, "time": int(3600 * hours / a_step)}
    per_step = config.trainer.batch_size
    if isinstance(runs.source, ActivationStore):
        each_pass = passes_of(config, runs.source, 1) / 1.5
        per_step = round(each_pass * runs.source.n_rows("train"))
        most["harvest"] = int(_MOST_PASSES / each_pass)
    limit = min(most, key=lambda name: most[name])
    long = max(1, most[limit])
    return Advice(
        target_l0=l0,
        l0_from=told,
        lr=float(f"{factor * default_lr(chosen.d_sae, long, config.trainer.optimiser):.2g}"),
        d_sae=chosen.d_sae,
        steps=long,
        tokens=long * per_step,
        seconds=long * a_step,
        limit=limit,
        measured=tuple(runs.found.values()),
    )


def best_l0(
    measure: Callable[[float], Measured | None], start: float, *, highest: float
) -> tuple[float, L0From]:
    """The L0 that the data want, and what says so; whole numbers are tried.

    Args: measure gives None where there is no time left.
    """
    found: dict[float, Measured] = {}

    def tried(l0: float) -> None:
        l0 = float(max(1, min(round(l0), int(highest))))
        made = measure(l0)
        if made is not None:
            found[l0] = made

    for factor in (1.0, 0.5, 2.0, 0.25, 4.0):
        tried(start * factor)
    for _ in range(_LOWER):
        if _least(found) == min(found):
            tried(min(found) / 2)
    l0 = bend(found)
    if l0 is not None:
        _around(l0, tried)
        return bend(found) or l0, "bend"
    if _least(found) == max(found) and len(found) > 1:  # similarity only falls
        return start, "start"
    _around(_least(found), tried)
    return _least(found), "similarity"


def _around(l0: float, tried: Callable[[float], None]) -> None:
    for factor in (math.sqrt(0.5), math.sqrt(2)):
        tried(l0 * factor)


def _least(found: Mapping[float, Measured]) -> float:
    return smallest_alike({l0: each.decoder_similarity for l0, each in found.items()})


def bend(found: Mapping[float, Measured]) -> float | None:
    """Where FVU over L0, both as logarithms, bends most: above it features explain less each.

    None where it falls nowhere by less than 3/4 of how it fell before.
    """
    l0s = sorted(found)
    x, y = [math.log(l0) for l0 in l0s], [math.log(max(found[l0].fvu, 1e-12)) for l0 in l0s]
    slopes = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    bends = {
        l0s[i + 1]: (after - before) / (x[i + 2] - x[i])
        for i, (before, after) in enumerate(pairwise(slopes))
        if before < 0 and after > _FLATTER * before
    }
    return max(bends, key=bends.__getitem__) if bends else None


def factor_of(tried: Sequence[Measured | None]) -> float:
    """The factor on the learning rate that gave the lowest FVU, of runs that there was time for."""
    return min((each for each in tried if each), key=lambda each: each.fvu).lr_factor


def smallest_alike(similarity: Mapping[float, float]) -> float:
    """The smallest L0 whose similarity is the least, or as good as the least.

    >>> smallest_alike({4.0: 0.06, 8.0: 0.05, 16.0: 0.04999, 32.0: 0.055})
    8.0
    """
    least = min(similarity.values())
    return min(l0 for l0, value in similarity.items() if value <= (1 + _ALIKE) * least)


def best_width(widths: Sequence[Measured]) -> Measured:
    """The widest that is worth it, of runs that are alike but for their width."""
    ascending = sorted(widths, key=lambda each: each.d_sae)
    best = ascending[0]
    for each in ascending[1:]:
        if each.fvu > (1 - _WORTH) * best.fvu or each.dead_fraction > _MOST_DEAD:
            break
        best = each
    return best


def doublings(fvu: Sequence[float]) -> int:
    """How often to double the longest of runs whose lengths double, given their FVU.

    >>> doublings([0.2, 0.18, 0.17]), doublings([0.2, 0.2])
    (2, 0)
    """
    gains = [1 - after / before for before, after in pairwise(fvu)]
    if not gains or gains[-1] < _DOUBLING:
        return 0
    falls = _SLOWEST
    if len(gains) > 1 and gains[-2] > 0:
        falls = min(_SLOWEST, gains[-1] / gains[-2])
    gain, count = gains[-1] * falls, 0
    while gain >= _DOUBLING:
        gain, count = gain * falls, count + 1
    return count
