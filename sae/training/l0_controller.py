"""Brings L0 to a target where sparsity is a penalty, by a factor on the penalty.

With e = log(L0 / target), smoothed and looked ahead along its slope, and bounded to [-1, 1]:

    log penalty = I + P g e,      I <- I + K sqrt(g) e / total_steps

Every time constant is a fraction of the run, so runs of 300 and of 100,000 steps behave alike. Why
it is more than an integrator:

* L0 may not answer at first (JumpReLU's thresholds below all pre-activations): the penalty then
  grows geometrically, by e^K over a whole run, until it does. As e is bounded, and so is the
  change in a step, it never grows much faster, however far off L0 is.
* L0 answers late (weights move a learning rate a step), so by the time it is at the target it is
  falling fast: the look-ahead lets go of the penalty before.
* How strongly L0 answers differs by orders of magnitude between architectures and targets. A gain
  that is too high shows as an oscillation: where e crosses 0 with swings that do not die away,
  g is cut; after a calm time it recovers, so that it is never much too low either.
* An L1 penalty on activations times free decoder norms may shrink the norms to nothing before any
  feature falls silent: it then lets go until features mean something again. And once it outweighs
  the error by far, Adam's steps are as large as they get: more of it lowers L0 no faster, but would
  still be there when L0 has come down, and all features would die. So it then stays.
"""

import math
from collections.abc import Mapping
from typing import Any

from sae.core.base import SparseAutoencoder
from sae.training.trainer_config import TrainerConfig
from saescope.errors import InputError, check_range

_INTEGRAL, _PROPORTIONAL = 25.0, 1.0
_SLEW = 50.0
"""largest change of log penalty, were it to go on for the whole run"""
_LOOK_AHEAD = 0.03
"""fraction of the run"""
_SMOOTHING = 0.01
"""fraction of the run over which L0 is averaged, but at least so many steps:"""
_SMOOTHING_STEPS = 2.0
_FLOOR = 0.01
"""an L0 below so much of the target counts as so much: its logarithm stays finite"""
_LIMIT = math.log(1e6)
"""of log penalty, either way"""
_SWING = 0.07
"""a smaller swing of e is noise"""
_DYING = 0.6
"""swings that shrink by this factor, each by each, are dying away"""
_CUT, _LEAST_GAIN = 0.5, 0.05
_CALM = 0.1
"""fraction of the run after a cut before the gain recovers"""
_RECOVERY = 4.0
"""log gain recovered over a whole run"""
_OUTWEIGHS = 10.0
"""a penalty of so many times the reconstruction's loss grows no further"""
_MEANS_NOTHING = 0.2
"""Features that add no more than so much of the error's deviation to a row have collapsed: they
cannot explain much of it, as ||sum f_i W_i|| <= sum f_i ||W_i||."""
REACHED = 0.05
"""an L0 is at its target within this fraction of it"""


def reached(l0: float, target: float) -> bool:
    """Whether a mean L0 is the one that was asked for."""
    return abs(l0 - target) <= REACHED * target


class L0Controller:
    """Moves `penalty`, which the trainer gives to the loss, so that L0 ends at the target.

    Args:
        target: mean number of active features a row.
        start: the one aimed at when the run begins, which falls by equal ratios to the target.
        fraction: of the run, over which it falls.
        total_steps: steps of the run.
        warmup_fraction: fraction of the run before which nothing is moved: the architecture's own
            warm-up of the penalty, during which L0 says nothing (`SAEConfig.penalty_warmup`).

    >>> controller = L0Controller(32.0, total_steps=1000)
    >>> controller.update(l0=64.0, step=500)
    >>> controller.penalty > 1
    True
    """

    def __init__(
        self,
        target: float,
        *,
        total_steps: int,
        warmup_fraction: float = 0.05,
        start: float | None = None,
        fraction: float = 0.0,
    ) -> None:
        check_range("target_l0", target, above=0)
        check_range("training steps", total_steps, low=1)
        check_range("warmup_fraction", warmup_fraction, low=0, high=1)
        self.target, self.total_steps = target, total_steps
        self._start, self._falling = start or target, fraction * total_steps
        self.first_step = round(warmup_fraction * total_steps)
        self.penalty = 1.0
        """what the sparsity coefficient is to be multiplied by"""
        self._rate = 1 / max(_SMOOTHING_STEPS, _SMOOTHING * total_steps)
        self._integral = 0.0
        self._gain = 1.0
        self._level: float | None = None
        self._slower = 0.0
        self._side = 0
        self._since = 0
        self._peak = self._last_peak = 0.0

    def update(self, l0: float, step: int, terms: Mapping[str, float] | None = None) -> None:
        """Take in the L0 of the training batch at a step (0-based), after the step.

        terms: of the batch's loss, where decoder norms are free; an "l1" among them, of activations
        times these norms in standard deviations of the data, says whether the penalty is any good.

        Raises InputError for an L0 that is not a number from 0 on.
        """
        if not (math.isfinite(l0) and l0 >= 0):
            raise InputError("not an L0", where="L0Controller", given=l0)
        aim = self.aim(step)
        error = math.log(max(l0, _FLOOR * aim) / aim)
        if self._level is None:
            self._level = self._slower = error
        self._level += self._rate * (error - self._level)
        self._slower += self._rate * (self._level - self._slower)
        if step < self.first_step:
            return
        slope = self._rate * (self._level - self._slower)
        ahead = self._level + _LOOK_AHEAD * self.total_steps * slope
        self._adapt(self._level)
        bounded = max(-1.0, min(1.0, ahead))
        if terms is not None and "l1" in terms and self._level > 0:
            if terms["l1"] < _MEANS_NOTHING * min(1.0, terms["fvu"]) ** 0.5:
                bounded = -1.0
            elif terms["loss"] - terms["fvu"] > _OUTWEIGHS * terms["fvu"]:
                bounded = min(bounded, 0.0)
        integral = self._integral + _INTEGRAL * self._gain**0.5 * bounded / self.total_steps
        # bounded itself, so that it has no way to go back when L0 answers at last
        self._integral = max(-_LIMIT, min(_LIMIT, integral))
        total = self._integral + _PROPORTIONAL * self._gain * bounded
        before, most = math.log(self.penalty), _SLEW / self.total_steps
        total = max(before - most, min(before + most, total))
        self.penalty = math.exp(max(-_LIMIT, min(_LIMIT, total)))

    def aim(self, step: int) -> float:
        """The L0 that is aimed at after a step (0-based).

        >>> falling = L0Controller(8.0, total_steps=8, start=32.0, fraction=0.5)
        >>> [round(falling.aim(step), 1) for step in range(6)]
        [32.0, 22.6, 16.0, 11.3, 8.0, 8.0]
        """
        left = max(0.0, 1 - step / self._falling) if self._falling else 0.0
        return self.target * (self._start / self.target) ** left

    def _adapt(self, error: float) -> None:
        """Cut the gain where swings about the target do not die away; let it recover after."""
        side = 1 if error > 0 else -1
        if side != self._side:
            if self._peak > _SWING:
                if self._peak > _DYING * self._last_peak > 0:
                    self._gain, self._since = max(_LEAST_GAIN, _CUT * self._gain), 0
                self._last_peak = self._peak
            self._side, self._peak = side, 0.0
        self._since += 1
        self._peak = max(self._peak, min(abs(error), 1.0))
        if self._since > _CALM * self.total_steps:
            self._gain = min(1.0, self._gain * (1 + _RECOVERY / self.total_steps))

    def state_dict(self) -> dict[str, Any]:
        """Where the controller stands: JSON-able, and exact (JSON keeps every bit of a float)."""
        names = ("target", "total_steps", "first_step", "penalty")
        return {
            name: value for name, value in vars(self).items() if name in names or name in _STATE
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises InputError if that was of another target or length of run.
        """
        for name in ("target", "total_steps", "first_step"):
            if state.get(name) != getattr(self, name):
                raise InputError(
                    f"the state of another controller: {name} differs",
                    where="load_state_dict",
                    given=state.get(name),
                    allowed=str(getattr(self, name)),
                )
        self.penalty = float(state["penalty"])
        for name in _STATE:
            setattr(self, name, state[name])


def controller_for(
    sae: SparseAutoencoder, config: TrainerConfig, total_steps: int
) -> L0Controller | None:
    """What moves the penalty towards the L0 asked for, where there are both."""
    if config.target_l0 is None or not sae.penalised:
        return None
    return L0Controller(
        config.target_l0,
        start=config.target_l0_start,
        fraction=config.target_l0_fraction,
        total_steps=total_steps,
        warmup_fraction=sae.config.penalty_warmup,
    )


_STATE = ("_integral", "_gain", "_level", "_slower", "_side", "_since", "_peak", "_last_peak")
