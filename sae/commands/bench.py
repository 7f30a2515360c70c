"""`saescope bench`: times of operations and of whole training steps on this machine."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sae.architectures import architecture
from sae.bench import rows
from sae.bench.dense import KINDS
from sae.bench.inputs import Inputs, Shape, planted, prepare
from sae.bench.operations import OPERATIONS, make_operation, make_problem
from sae.bench.steps import DENSE, Setting, make_stepper
from sae.bench.timing import Times, interleaved
from saescope import __version__
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.metrics import metric
from saescope.paths import local
from saescope.progress import say

OURS, BASELINE = "saescope", "dense torch"
"""whose times are compared"""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Config):
    """Time the operations of a training step, and whole steps, on synthetic data."""

    out: str | None = None
    """CSV file that a row is added to for every time; only printed if not given."""
    shapes: tuple[str, ...] = ("2048x768x8192x32",)
    """Sizes, as BATCHxD_INxD_SAExK."""
    settings: tuple[str, ...] = ("dense", "product", "torch", "cpu", "cpu+int8", "cpu+int16")
    """What to time: dense (plain torch; of whole steps also dense+onednn, dense+bf16, and product:
    the encoder's product alone, which no exact step can beat), auto (what a run would choose here)
    or a backend of kernels (reference, torch, cpu, triton); cpu multiplies exactly, cpu+int8,
    cpu+int16 and cpu+bf16 screen first."""
    baseline: str = "dense"
    """The setting that the others' ratios are over."""
    what: Literal["all", "operations", "steps"] = "all"
    """Operations one by one, whole training steps, or both."""
    operations: tuple[str, ...] = OPERATIONS
    """Which operations."""
    architectures: tuple[str, ...] = ("topk",)
    """Whose training steps; dense knows topk, batchtopk, relu and jumprelu."""
    dead: int = 0
    """Features that count as dead, for AuxK to revive."""
    rounds: int = 5
    """Times that each is timed, in turn with the others; the median counts."""
    threads: int | None = None
    """Threads of torch; its own choice if not given."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the operations' tensors; for steps the precision of products under autocast."""
    seed: int = 0
    """Seed of the data and the weights."""

    def __post_init__(self) -> None:
        for name in ("shapes", "settings"):
            if not getattr(self, name):
                raise InputError("nothing to time", where=name, given=getattr(self, name))
        for shape in self.shapes:
            check_range("dead", self.dead, low=0, below=Shape.parse(shape).d_sae)
        for name in (*self.settings, self.baseline):
            Setting(name)
        for name in self.operations:
            if name not in OPERATIONS:
                raise InputError(
                    "no such operation", where="operations", given=name, allowed=OPERATIONS
                )
        check_range("rounds", self.rounds, low=1)
        if self.threads is not None:
            check_range("threads", self.threads, low=1)


def bench(config: BenchConfig) -> list[dict[str, Any]]:
    """Time what is asked for; print a table, and add rows to the file. Returns the rows.

    Raises InputError for kernels that cannot run here, an architecture that cannot be stepped on
    plain rows, or a file of results with other columns.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no such device", where="device", given="cuda", allowed="cpu")
    out = None if config.out is None else local(config.out)
    if out is not None:
        rows.read(out)
    if config.what != "operations":
        _check_architectures(config)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    found: list[dict[str, Any]] = []
    try:
        facts = rows.facts(config.device)
        say(f"{facts['device']}: {facts['processor']}, {facts['threads']} threads")
        for text in config.shapes:
            for timed in _of_shape(config, Shape.parse(text), facts):
                for line in table(timed, config.baseline):
                    say(line)
                if out is not None:
                    rows.append(out, timed)
                found += timed
    finally:
        torch.set_num_threads(before)
    return found


def _check_architectures(config: BenchConfig) -> None:
    for name in config.architectures:
        architecture(name)
        if name not in KINDS and any(setting in DENSE for setting in config.settings):
            raise InputError(
                "has no dense step; leave dense out of the settings, or take reference for it",
                where="architectures",
                given=name,
                allowed=KINDS,
            )


def _of_shape(
    config: BenchConfig, shape: Shape, facts: Mapping[str, Any]
) -> Iterable[list[dict[str, Any]]]:
    x, weights = planted(shape, seed=config.seed)

    def inputs(kind: str) -> Inputs:
        made = prepare(x, weights, kind, shape.k, dead=config.dead, seed=config.seed)
        return made.to(config.device)

    base = {
        **facts,
        **vars(shape),
        "data": "synthetic",
        "dtype": config.dtype,
        "dead": config.dead,
    }
    settings = [Setting(name) for name in config.settings]
    if config.what != "steps":
        yield from _operations(config, inputs("topk"), settings, base)
    if config.what != "operations":
        for kind in config.architectures:
            yield _steps(config, inputs(kind), kind, settings, base)


def _operations(
    config: BenchConfig, inputs: Inputs, settings: Sequence[Setting], base: Mapping[str, Any]
) -> Iterable[list[dict[str, Any]]]:
    settings = [each for each in settings if each.name == "dense" or each.name not in DENSE]
    problem = make_problem(inputs, base["k"], getattr(torch, config.dtype))
    for name in config.operations:
        calls = {each.name: make_operation(name, each, problem) for each in settings}
        times = interleaved(calls, rounds=config.rounds, device=config.device)
        yield [
            _row(base, "operation", name, setting, times[setting], problem.l0) for setting in times
        ]


def _steps(
    config: BenchConfig,
    inputs: Inputs,
    kind: str,
    settings: Sequence[Setting],
    base: Mapping[str, Any],
) -> list[dict[str, Any]]:
    steppers = {
        each.name: make_stepper(each, inputs, kind, base["k"], precision=config.dtype)
        for each in settings
    }
    counts = dict.fromkeys(steppers, 0)

    def call(name: str) -> Callable[[], object]:
        def run() -> None:
            steppers[name].mark(inputs.dead)
            steppers[name].step(inputs.x[counts[name] % len(inputs.x)])
            counts[name] += 1

        return run

    times = interleaved(
        {name: call(name) for name in steppers}, rounds=config.rounds, device=config.device
    )
    return [
        _row(base, "step", kind, name, times[name], stepper.found["l0"])
        for name, stepper in steppers.items()
    ]


def _row(
    base: Mapping[str, Any], kind: str, name: str, setting: str, times: Times, l0: float
) -> dict[str, Any]:
    dense = setting in DENSE
    return {
        **base,
        "kind": kind,
        "name": name,
        "library": BASELINE if dense else OURS,
        "version": torch.__version__ if dense else __version__,
        "setting": setting,
        "options": "",
        "l0": l0,
        **times.columns(),
    }


def table(found: Sequence[Mapping[str, Any]], baseline: str) -> Iterable[str]:
    """Lines for people, the ratio being the baseline's time over a setting's."""
    over = next((row["median_s"] for row in found if row["setting"] == baseline), None)
    first = found[0]
    shape = "x".join(str(first[name]) for name in ("batch", "d_in", "d_sae", "k"))
    dead = f", {first['dead']} dead" if first["dead"] else ""
    yield f"{first['name']} ({first['kind']}) {shape}, {metric('l0').text(first['l0'])}{dead}"
    for row in found:
        ratio = f"{over / row['median_s']:7.2f}x" if over is not None else ""
        yield (
            f"  {row['setting']:<14}{1000 * row['median_s']:>10.1f} ms{ratio}"
            f"   least {1000 * row['least_s']:.1f} ms, {1000 * row['cpu_s']:.0f} ms of processor"
        )
