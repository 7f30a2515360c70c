"""`saescope eval RUN...`: one run, or several, one after another.

Processes that torchrun or srun started share the runs: each takes one that nobody has, and rank 0,
which tells of them all, measures in the end what the others could not.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from activations.harvesting.window_locks import Team, member, pauses, shared
from sae.commands.compare_metrics import summary_lines
from sae.commands.controls import measure_controls
from sae.commands.evaluate import (
    EVALUATION,
    EvaluateConfig,
    evaluate,
    write_evaluation,
)
from sae.commands.evaluation_files import check_metric_table, write_metrics
from sae.commands.held_out import HeldOut
from sae.commands.reliability import measure_reliability, reliability_file, seeds_of_runs
from sae.commands.sweep import MEMBERS, read_members
from sae.evaluation import Family, chosen
from sae.evaluation.controls_file import CONTROLS_KIND, controls_file, controls_lines
from sae.evaluation.floors_file import RELIABILITY, reliability_lines
from sae.evaluation.unfinished_file import Unfinished
from sae.evaluation.written import measured_values, read_evaluation, rows_of
from sae.formats.hub import SCHEME, HubFolder, evaluation_file
from saescope.artefact import write_report
from saescope.errors import InputError, SaescopeError, check_range
from saescope.paths import AnyPath, as_path, exists
from saescope.process_rank import this_rank
from saescope.progress import duration, say, silent
from saescope.replacing import check_replaceable
from saescope.system import system_errors
from saescope.terminal import complain

_FAILED = 2
"""exit code"""


@dataclass(frozen=True, kw_only=True)
class EvaluateRunsConfig(EvaluateConfig):
    """Measure SAEs on the held-out part of a harvest."""

    runs: tuple[str, ...] = ()
    """Further ones, measured one after another. The folder of a sweep, here and as run, stands for
    all of its runs."""
    reliability: bool = False
    """Measure the smallest difference that each metric can tell, from these runs, three or more,
    better five, that differ in nothing but their seed. It is written to `out`, or to
    reliability.json beside the first run's folder."""
    metric_seeds: int = 5
    """With reliability, how many seeds each metric that has one of its own (of absorption and
    ravel) is measured with, each about as long as the first; with 1, the evaluation's own, their
    sample sd is not told, and the smallest difference is the same."""
    controls: bool = False
    """Measure what every metric has to rank below the SAE, too: its decoder rows permuted, random
    directions, an untrained SAE, PCA. It is written to controls.json beside the evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("metric_seeds", self.metric_seeds, low=1, high=100)
        if self.reliability and self.controls:
            raise InputError("is measured apart from controls; leave one out", where="reliability")


@system_errors()
def evaluate_runs(config: EvaluateRunsConfig) -> int:
    """Measure one run as `evaluate` does, or several; the exit code.

    Of several each has its own evaluation.json. One that is measured already under the protocol of
    now is left; one that cannot be measured is named, the others go on, and the exit code is 2.

    With `reliability` the smallest differences that the metrics can tell are measured after that,
    with `controls` each SAE's controls.

    Raises InputError for `out` with several runs, for a family that is unknown, and for runs that
    reliability cannot be measured of (`sae.commands.reliability`); for one run alone the errors of
    `evaluate`.
    """
    names = _names((config.run, *config.runs))
    one = EvaluateConfig(
        **{field.name: getattr(config, field.name) for field in fields(EvaluateConfig)}
    )
    if config.reliability:
        return _reliability(config, [replace(one, run=name, out=None) for name in names])
    plain = names == [config.run] and not config.controls
    if plain and this_rank().size == 1:
        evaluate(one)
        return 0
    if config.out is not None and len(names) > 1:
        raise InputError(
            "is one file, for several runs; each has its own evaluation.json",
            where="out",
            given=config.out,
            allowed="leave it out",
        )
    wanted = chosen(config.metrics, config.suite)
    runs = [replace(one, run=name) for name in names]
    return _controls(runs, wanted) if config.controls else _measure_all(runs, wanted)


def _measure_all(
    runs: Sequence[EvaluateConfig], wanted: Sequence[Family], *, controls: bool = False
) -> int:
    """Measure runs, with the other processes if there are any; the exit code."""
    names = [run.run for run in runs]
    sharing = _Sharing(runs, wanted, controls=controls)
    if this_rank().number:
        try:
            with silent(), _team(names) as team:
                sharing.help_with(team)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        return 0  # rank 0 says what could not be measured
    with _team(names) as team:
        return sharing.lead(team)


def _controls(runs: Sequence[EvaluateConfig], wanted: Sequence[Family]) -> int:
    """Measure runs, and the controls of each; the exit code."""
    paths = {run.run: _evaluation_path(run) for run in runs}
    for path in paths.values():
        check_replaceable(controls_file(path), CONTROLS_KIND, replace=True)
    failed = _measure_all(runs, wanted, controls=True)
    if failed or this_rank().number:
        return failed
    for run in runs:
        path = paths[run.run]
        unfinished = Unfinished(path)
        found = measure_controls(run, read_evaluation(path), wanted, unfinished=unfinished)
        try:
            write_report(controls_file(path), found, CONTROLS_KIND, replace=run.replace)
            unfinished.forget()
        finally:  # what was measured is told, wherever it cannot be written
            for line in controls_lines(found):
                say(line)
        say(f"{controls_file(path)}: the controls of {run.run}")
    return 0


def _evaluation_path(run: EvaluateConfig) -> AnyPath:
    return as_path(run.out) if run.out is not None else evaluation_file(run.run)


def _reliability(config: EvaluateRunsConfig, runs: Sequence[EvaluateConfig]) -> int:
    """Measure runs, and from them the smallest differences that metrics tell; the exit code."""
    wanted = chosen(config.metrics, config.suite)
    names = [run.run for run in runs]
    seeds_of_runs(names)
    path = reliability_file(names, config.out)
    check_replaceable(path, RELIABILITY, replace=True)
    unfinished = Unfinished(path)
    failed = _measure_all(runs, wanted)
    if failed or this_rank().number:
        return failed
    evaluations = {name: read_evaluation(evaluation_file(name)) for name in names}
    found = measure_reliability(
        runs, evaluations, wanted, metric_seeds=config.metric_seeds, unfinished=unfinished
    )
    try:
        write_report(path, found, RELIABILITY, replace=config.replace)
        unfinished.forget()
    finally:  # what was measured is told, wherever it cannot be written
        for line in reliability_lines(found, rows_of(found)):
            say(line)
    say(f"{path}: what {len(names)} seeds tell under protocol {found['protocol_hash'][:12]}")
    return 0


def _names(given: Sequence[str]) -> list[str]:
    """The runs of these names, each once; instead of a sweep all of its runs."""
    found: list[str] = []
    for name in given:
        folder = None if name.startswith(SCHEME) else as_path(name)
        if folder is not None and exists(folder / MEMBERS):
            found += [str(folder / each) for each in read_members(folder)]
        else:
            found.append(name)
    return list(dict.fromkeys(found))


@contextmanager
def _team(names: Sequence[str]) -> Iterator[Team | None]:
    """This process as one of several; None if it is alone."""
    if this_rank().size == 1:
        yield None
        return
    given = [as_path(name) for name in names if not name.startswith(SCHEME)]
    there = [each.absolute() for each in given if isinstance(each, Path) and each.is_dir()]
    beyond = [each for each in given if not isinstance(each, Path)]
    beside: AnyPath = [*there, *map(shared, beyond[:1]), Path.cwd() / "hub"][0]
    with member(beside.with_name(f"{beside.name}.evaluation"), "an evaluation") as team:
        yield team


class _Sharing:
    """Runs to measure, each with its own configuration, and the families to measure.

    Args: controls says that they follow, and may have figures in the file of what is unfinished.
    """

    def __init__(
        self, runs: Sequence[EvaluateConfig], wanted: Sequence[Family], *, controls: bool
    ) -> None:
        self.runs, self.wanted, self.controls = runs, wanted, controls

    def help_with(self, team: Team | None) -> None:
        """Measure runs that no other process has; what cannot be measured is rank 0's to tell."""
        for number, run in enumerate(self.runs):
            if team is not None and team.claim(number):
                try:
                    self._measured(run)
                except SaescopeError:
                    continue
                finally:
                    team.release(number)

    def lead(self, team: Team | None) -> int:
        """See to it that all runs are measured; tell of each, and of all in a table."""
        found: dict[str, Mapping[str, Any]] = {}
        waiting, waits, told = list(enumerate(self.runs)), pauses(), 0
        while waiting:
            others = []
            for number, run in waiting:
                if team is not None and not team.claim(number):
                    others.append((number, run))
                    continue
                told += 1
                try:
                    found[run.run] = self._tell(run, f"{told} of {len(self.runs)}")
                except SaescopeError as error:
                    complain(f"{told} of {len(self.runs)}  {run.run} is not measured: {error}")
                finally:
                    if team is not None:
                        team.release(number)
            waiting = others
            next(waits)
        for line in (*_table(found), *summary_lines(found)):
            say(line)
        failed = len(self.runs) - len(found)
        if failed:
            complain(f"{failed} of {len(self.runs)} runs could not be measured; see above")
        return _FAILED if failed else 0

    def _tell(self, run: EvaluateConfig, count: str) -> Mapping[str, Any]:
        start = time.monotonic()
        with silent():
            evaluation, new = self._measured(run)
        how = f"measured in {duration(time.monotonic() - start)}" if new else "is measured already"
        say(f"{count}  {run.run}: {how}")
        return evaluation

    def _measured(self, run: EvaluateConfig) -> tuple[Mapping[str, Any], bool]:
        """A run's evaluation, and whether it was made now."""
        path = _evaluation_path(run)
        unfinished = Unfinished(path)
        data = HeldOut.open(run, unfinished=unfinished)
        if exists(path) and EVALUATION.holds(path) and _is_of_one_sae(run.run):
            before = read_evaluation(path)
            if data.measured_in(before, self.wanted):
                # which an older version, or a kill, may have left out
                write_metrics(path, before, run.run, data.sae)
                if not self.controls:
                    unfinished.forget()  # which a kill may have left
                return before, False
        check_replaceable(path, EVALUATION, replace=run.replace)
        check_metric_table(path)
        result = data.measure(self.wanted)
        write_evaluation(path, result, data)
        return result, True


def _is_of_one_sae(name: str) -> bool:
    """Whether what this names stays what it is: a branch of the hub's may have a new SAE."""
    return not name.startswith(SCHEME) or HubFolder.parse(name).is_commit


def _table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a table with a run a line, and a column for each metric but the minor ones.

    >>> one = {"protocol_hash": "0123456789abcdef", "reconstruction": {"l0": 8.0, "fvu": 0.25}}
    >>> other = one | {"reconstruction": {"l0": 16.0}}
    >>> print("\\n".join(_table({"runs/a": one, "runs/b": other})))
    run        L0     FVU      protocol
    runs/a   8.00  0.2500  0123456789ab
    runs/b  16.00       -  0123456789ab
    """
    if not found:
        return []
    each = {name: (rows_of(one), measured_values(one)) for name, one in found.items()}
    known = {name: row for rows, _ in each.values() for name, row in rows.items()}
    shown = [
        row
        for name, row in known.items()
        if not row.minor and any(values.get(name) is not None for _, values in each.values())
    ]
    lines = [["run", *(row.label for row in shown), "protocol"]]
    for name, (_, values) in each.items():
        texts = ["-" if (v := values.get(row.name)) is None else row.shown(v) for row in shown]
        lines.append([name, *texts, found[name]["protocol_hash"][:12]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
