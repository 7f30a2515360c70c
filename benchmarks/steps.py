"""Whole training steps of every library on the very same tensors, in turn: rows of steps.csv.

    python -m benchmarks.steps
    python -m benchmarks.performance      (the page docs/reports/performance.md, from the rows)

A process for each library and setting, in the library's own environment; while one steps, the
others sleep. At small shapes all hold their tensors throughout and step one after the other, round
by round, twice each: the second step is timed. At large ones, where that would not fit into memory,
each takes its turn: it loads, steps twice untimed, is timed, and lets go.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.peers.stepping import DENSE, OURS, Worker
from benchmarks.running import run
from benchmarks.steps_data import settled
from sae.bench import rows
from sae.bench.inputs import Shape, prepare
from sae.bench.steps import Setting
from sae.bench.timing import Times
from saescope.config import Config
from saescope.errors import ArtefactError, InputError, check_range
from saescope.metrics import metric
from saescope.progress import say

SMALL, MID, LARGE = (
    Shape.parse(text)
    for text in ("2048x768x8192x32", "4096x576x16384x64", "4096x768x32768x64")
)  # fmt: skip
Who = tuple[str, str]
"""a library and its setting"""
EXACT, TORCH = (OURS, "cpu"), (OURS, "torch")
SCREENED = tuple((OURS, f"cpu+{screen}") for screen in ("int8", "int16", "bf16"))
SAELENS, SPARSE = ("SAELens", "default"), ("SAELens", "sparse")
DICTIONARY = ("dictionary_learning", "default")
SIGNUM, ADAM = ("sparsify", "signum"), ("sparsify", "adam")
DENSE_TORCH, ONEDNN, BF16 = (DENSE, "dense"), (DENSE, "dense+onednn"), (DENSE, "dense+bf16")
PRODUCTS = ((DENSE, "product"), (DENSE, "product+onednn"))
ALL: tuple[Who, ...] = (
    EXACT, *SCREENED, TORCH, SAELENS, SPARSE, DICTIONARY, SIGNUM, ADAM, DENSE_TORCH, ONEDNN, BF16,
    *PRODUCTS,
)  # fmt: skip
OTHERS: tuple[Who, ...] = (
    EXACT,
    *SCREENED[:2],
    TORCH,
    SAELENS,
    DICTIONARY,
    DENSE_TORCH,
    PRODUCTS[0],
)
"""that step other architectures than TopK"""
_DEAD_PART = 256
"""one feature in so many is dead: 29 of 8192 were at the end of the default run"""
_SAME = 0.02
"""squared errors differ by so little: by bfloat16, and by sparsify's b_dec, the batch's mean"""
_TINY = Shape(batch=256, d_in=64, d_sae=1024, k=8)


@dataclass(frozen=True)
class Scenario:
    """One comparison."""

    name: str
    shape: Shape
    kind: str = "topk"
    dead: int = 0
    rounds: int = 5
    together: bool = True
    """all in memory at once, round by round; otherwise one by one, `rounds` times over"""
    who: tuple[Who, ...] = ALL


def _scenarios() -> Iterator[Scenario]:
    yield Scenario("small", SMALL, rounds=7)
    yield Scenario("small-dead", SMALL, dead=SMALL.d_sae // _DEAD_PART)
    yield Scenario("mid", MID, rounds=3, together=False)
    yield Scenario("mid-dead", MID, dead=MID.d_sae // _DEAD_PART, rounds=1, together=False)
    yield Scenario("large", LARGE, rounds=2, together=False)
    yield Scenario(
        "large-dead", LARGE, dead=LARGE.d_sae // _DEAD_PART, rounds=1, together=False,
        who=(EXACT, TORCH, SAELENS, SPARSE, DICTIONARY, SIGNUM, PRODUCTS[0]),
    )  # fmt: skip
    for kind in ("jumprelu", "batchtopk", "relu"):
        for l0 in (32, 64):
            yield Scenario(f"small-{kind}-{l0}", replace(SMALL, k=l0), kind, rounds=4, who=OTHERS)
        yield Scenario(f"mid-{kind}-64", MID, kind, rounds=2, together=False, who=OTHERS)


SCENARIOS = {each.name: each for each in _scenarios()}


@dataclass(frozen=True, kw_only=True)
class StepsConfig(Config):
    """Time whole training steps of saescope and of other libraries."""

    results: str = "benchmarks/results/steps.csv"
    """File that rows are added to."""
    work: str = "build/peers"
    """Folder for environments, inputs and logs."""
    harvest: str | None = "data/smollm2-135m-wikipedia"
    """Harvest whose rows are stepped on where it has the shape's width; None: synthetic rows."""
    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    """Which comparisons."""
    libraries: tuple[str, ...] = field(default_factory=lambda: tuple(dict(ALL)))
    """Which libraries."""
    settings: tuple[str, ...] = field(default_factory=lambda: tuple({who[1]: 0 for who in ALL}))
    """Which of their settings; screens that this machine lacks are left out."""
    rounds: int | None = None
    """Times that each is timed, if not the comparison's own number."""
    settle: int = 100
    """Steps of training that the weights come from."""
    tiny: bool = False
    """Every comparison at one tiny shape, to see that everything runs."""
    threads: int = 2
    """Threads of torch, in every library."""
    seed: int = 0
    """Seed of the data and the weights."""

    def __post_init__(self) -> None:
        known_settings = tuple({who[1]: 0 for who in ALL})
        for name, known in (
            ("scenarios", tuple(SCENARIOS)),
            ("libraries", tuple(dict(ALL))),
            ("settings", known_settings),
        ):
            for each in getattr(self, name):
                if each not in known:
                    raise InputError("not compared", where=name, given=each, allowed=known)
        if self.rounds is not None:
            check_range("rounds", self.rounds, low=1)
        check_range("settle", self.settle, low=0)
        check_range("threads", self.threads, low=1)

    def chosen(self) -> list[Scenario]:
        """The comparisons, with what the fields change."""
        return [self._changed(SCENARIOS[name]) for name in self.scenarios]

    def _changed(self, each: Scenario) -> Scenario:
        who = tuple(
            (library, setting)
            for library, setting in each.who
            if library in self.libraries
            and setting in self.settings
            and (library != OURS or Setting(setting).screened_here())
        )
        each = replace(each, who=who, rounds=self.rounds or each.rounds)
        if not self.tiny:
            return each
        dead = _TINY.d_sae // _DEAD_PART if each.dead else 0
        return replace(each, shape=_TINY, dead=dead)


def measure(config: StepsConfig) -> None:
    """Run the comparisons, adding rows to the results after each.

    Raises ArtefactError if a library fails; what was measured before is kept.
    """
    path, chosen = Path(config.results), config.chosen()
    rows.read(path)
    torch.set_num_threads(config.threads)
    with ExitStack() as stack:
        workers: dict[Who, Worker] = {}
        for who in dict.fromkeys(who for each in chosen for who in each.who):
            # all at once: importing takes longest
            worker = Worker(*who, work=Path(config.work), threads=config.threads)
            workers[who] = stack.enter_context(worker)
        facts = rows.facts("cpu")
        for number, scenario in enumerate(chosen):
            say(f"{scenario.name}: {scenario.kind} {scenario.shape} ({number + 1}/{len(chosen)})")
            inputs, data = _write_inputs(config, scenario)
            found = _run(scenario, [workers[who] for who in scenario.who], inputs)
            base = {
                **facts, **vars(scenario.shape), "kind": "step", "name": scenario.kind,
                "data": data, "dtype": "float32",
            }  # fmt: skip
            measured = [{**base, **row} for row in found]
            rows.append(path, measured)
            _show(measured)


def _write_inputs(config: StepsConfig, scenario: Scenario) -> tuple[Path, str]:
    shape, work = scenario.shape, Path(config.work)
    harvest = config.harvest if shape.d_in == MID.d_in else None
    # whatever L0 is wanted, the weights are the same
    trained = next((s for s in (SMALL, MID, LARGE) if replace(s, k=shape.k) == shape), shape)
    x, weights = settled(trained, harvest=harvest, steps=config.settle, work=work, seed=config.seed)
    made = prepare(x, weights, scenario.kind, shape.k, dead=scenario.dead, seed=config.seed)
    folder = work / "steps" / "inputs"
    made.save(folder)
    return folder, "synthetic" if harvest is None else Path(harvest).name


def _run(scenario: Scenario, workers: Sequence[Worker], inputs: Path) -> Iterator[dict[str, Any]]:
    facts: dict[Worker, dict[str, Any]] = {}
    times = {worker: Times() for worker in workers}

    def load(worker: Worker) -> None:
        made = worker.load(inputs, scenario.kind, scenario.shape.k)
        facts[worker] = {**made, **worker.step()}  # untimed

    def step(worker: Worker) -> None:
        took = worker.step()
        times[worker].seconds.append(took["seconds"])
        times[worker].cpu_seconds.append(took["cpu_seconds"])

    if scenario.together:
        for worker in workers:
            load(worker)
        _check_same(facts)
    for number in range(scenario.rounds):
        first = number % max(1, len(workers))
        for worker in [*workers[first:], *workers[:first]]:
            if not scenario.together:
                load(worker)  # with a first step; the second still takes fresh memory
            worker.step()  # what the others did has left nothing of this one's in the caches
            step(worker)
            if not scenario.together:
                worker.drop()
    _check_same(facts)
    for worker in workers:
        worker.drop()
        known = {name: facts[worker][name] for name in ("version", "options", "torch", "threads")}
        yield {
            "library": worker.library, "setting": worker.setting, **known,
            "l0": float(facts[worker]["l0"]), "dead": int(facts[worker]["dead"]),
            **times[worker].columns(),
        }  # fmt: skip


def _check_same(facts: Mapping[Worker, Mapping[str, Any]]) -> None:
    """That all have computed the same thing, up to precision; ArtefactError if not."""
    for name in ("squared_error", "l0"):
        middle = median(found[name] for found in facts.values())
        for worker, found in facts.items():
            if not abs(found[name] - middle) <= _SAME * middle:
                raise ArtefactError(
                    f"computes otherwise than the others do: {name} differs",
                    where=f"{worker.library} {worker.setting}", given=f"{found[name]:.5g}",
                    allowed=f"{middle:.5g}, give or take {100 * _SAME:g}%",
                )  # fmt: skip


def _show(measured: Sequence[Mapping[str, Any]]) -> None:
    fastest = min(row["median_s"] for row in measured)
    for row in sorted(measured, key=lambda row: row["median_s"]):
        say(
            f"  {row['library']:<20} {row['setting']:<13}{row['median_s']:9.3f} s"
            f"{row['median_s'] / fastest:8.2f}x   {metric('l0').text(row['l0'])}, "
            f"{row['dead']} dead, {row['cpu_s']:.2f} s of processor"
        )


if __name__ == "__main__":
    run(StepsConfig, measure)
