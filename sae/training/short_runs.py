"""Short runs of one configuration, at other L0s, learning rates, widths and lengths.

Each is a run like any other, with its own warm-up and decay, but that nothing of it is written.
"""

import math
import time
from dataclasses import dataclass, replace

from activations import ActivationStore
from sae.evaluation.geometry import decoder_cosines
from sae.synthetic.world import World
from sae.training.config import TrainConfig
from sae.training.finish import FinishConfig
from sae.training.run import Run
from sae.training.schedules import default_lr
from sae.training.synthetic import SyntheticRun
from sae.training.trainer_config import TrainerConfig
from saescope.errors import InputError
from saescope.metrics import texts
from saescope.progress import duration, say, silent

LEAST_STEPS = 200
"""of a short run: fewer say nothing"""
TOGETHER = 14.0
"""lengths of a short run that all of them take together, at most"""
_WARM, _TIMED = 2, 8


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a short run is made with."""

    target_l0: float
    d_sae: int
    steps: int
    lr_factor: float = 1.0
    """of the learning rate that a run of this length takes by itself"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a short run came to, on held-out rows."""

    target_l0: float
    d_sae: int
    steps: int
    lr_factor: float
    lr: float
    """peak"""
    l0: float
    """reached"""
    fvu: float
    dead_fraction: float
    """features that fire on none of the rows"""
    decoder_similarity: float
    """mean |cosine| of all pairs of decoder directions"""
    seconds: float


class ShortRuns:
    """Makes short runs, none twice: the first, and others as long as there is time.

    Args:
        config: of the run that they stand for.
        source: its harvest, or its world.
        minutes: that they may take together.
        steps: of each; as many as the minutes allow if not given.

    Raises InputError if the minutes do not suffice for runs of 200 steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: ActivationStore | World,
        *,
        minutes: float,
        steps: int | None = None,
    ) -> None:
        self.config, self.source = config, source
        self.found: dict[Setting, Measured] = {}
        self._end = time.monotonic() + 60 * minutes
        seconds = self._seconds_a_step()
        self.steps = int((self._end - time.monotonic()) / TOGETHER / seconds)
        if steps is not None:
            self.steps = steps
        elif self.steps < LEAST_STEPS:
            raise InputError(
                f"too short for {TOGETHER:.0f} runs of {LEAST_STEPS} steps, of "
                f"{1000 * seconds:.0f} ms each",
                where="minutes",
                given=minutes,
                allowed=f"{math.ceil(1.1 * TOGETHER * LEAST_STEPS * seconds / 60)} or more",
            )

    def measure(self, setting: Setting) -> Measured | None:
        """Train and measure; None if there is no time for it."""
        if setting in self.found:
            return self.found[setting]
        if self.found and self._left() < self._expected(setting):
            return None
        begun = time.perf_counter()
        run = self.run(setting)
        with silent():
            trainer = run.make_trainer(None)
            sae = trainer.run().fold()
        held_out = trainer.last_held_out
        cosines = decoder_cosines(sae.decoder_directions())
        found = Measured(
            **vars(setting),
            lr=trainer.lr,
            l0=held_out["l0"],
            fvu=held_out["fvu"],
            dead_fraction=held_out["dead_fraction"],
            decoder_similarity=cosines[1] if cosines else 0.0,
            seconds=time.perf_counter() - begun,
        )
        self.found[setting] = found
        say(
            f"L0 {setting.target_l0:g}, {setting.d_sae:,} features, {setting.steps:,} steps, "
            f"learning rate {found.lr:.2g}: {texts(('l0', 'fvu', 'dead_fraction'), held_out)}, "
            f"decoder similarity {found.decoder_similarity:.5f} ({duration(found.seconds)}; "
            f"{duration(max(0.0, self._left()))} left)"
        )
        return found

    def run(self, setting: Setting) -> Run | SyntheticRun:
        """The run of a setting, which is not begun."""
        # the end of a run through the model is left out
        config, batch = replace(self.config, finish=FinishConfig()), self.config.trainer.batch_size
        trainer = replace(
            config.trainer,
            target_l0=setting.target_l0,
            lr=_lr(config.trainer, setting),
            lr_multiplier=None,
            dead_after_tokens=None,
            evaluate_every=setting.steps,
            snapshots=0,
            snapshot_tokens=(),
            telemetry="none",
        )
        sae = replace(config.sae, d_sae=setting.d_sae).with_target_l0(setting.target_l0)
        if isinstance(self.source, World):
            made = replace(config, sae=sae, trainer=trainer, samples=setting.steps * batch)
            return SyntheticRun(made, self.source)
        passes = passes_of(self.config, self.source, setting.steps)
        return Run(replace(config, sae=sae, trainer=trainer, passes=passes), self.source)

    def _seconds_a_step(self) -> float:
        """Of the configuration's own size; a few steps are made."""
        l0 = self.config.trainer.target_l0 or getattr(self.config.sae, "k", 32)
        trainer = self.run(
            Setting(target_l0=l0, d_sae=self.config.sae.d_sae, steps=_WARM + _TIMED)
        ).make_trainer(None)
        batches, times = iter(trainer.batches), []
        for _ in range(_WARM + _TIMED):
            begun = time.perf_counter()
            trainer.train_step(next(batches))
            times.append(time.perf_counter() - begun)
        return sorted(times[_WARM:])[_TIMED // 2]

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _expected(self, setting: Setting) -> float:
        """Seconds that a run takes, by those that were made."""
        of_all = [each.seconds / each.steps / each.d_sae for each in self.found.values()]
        return max(of_all, default=0.0) * setting.steps * setting.d_sae


def passes_of(config: TrainConfig, harvest: ActivationStore, steps: int) -> float:
    """The passes over a harvest that give a run so many steps."""
    per_step = config.trainer.batch_size
    if config.mix_layers == "all":
        per_step //= len(config.sites)
    return (steps + 0.5) * per_step / harvest.n_rows("train")


def _lr(trainer: TrainerConfig, setting: Setting) -> float:
    return setting.lr_factor * default_lr(setting.d_sae, setting.steps, trainer.optimiser)
