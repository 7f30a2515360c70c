"""`saescope sweep`: many SAEs, trained while the activations are read once.

A sweep file has a `base` (fields of a training file) and `grid` tables, in which a field may be a
list; each table's product of lists gives its members. A `layer` in a table is put for `{layer}`
in all texts of its members, so that one table trains an SAE a layer. Every member is a run like any
other, in its own folder, bit for bit what `saescope train` makes of the same settings. Processes
that torchrun or srun started share the members: each takes some that nobody has, and trains them by
itself.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activations import ActivationStore
from activations.harvesting.window_locks import Team, member, pauses, ranks_file, shared
from activations.sites.names import layers_of
from sae.data.harvests import open_complete
from sae.data.streams import Stream
from sae.training.config import TrainConfig
from sae.training.estimate import describe
from sae.training.run import Run
from saescope.artefact import SEAL, DamagedError, check_schema, check_seal, read_json, sha256_json
from saescope.config import Config, from_dict
from saescope.errors import InputError, check_range
from saescope.locks import locked
from saescope.paths import AnyPath, as_path, exists
from saescope.process_rank import this_rank
from saescope.progress import Progress, say, silent
from saescope.seals import write_sealed
from saescope.system import system_errors

MEMBERS = "members.json"
LAYER = "layer"
"""the entry of a grid table that names layers"""
_LAYER_HERE = "{layer}"
MEMBERS_SCHEMA = 2
"""the first had no number, no table of its own for the members, and no sha256"""
_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f]{1,200}")
"""a folder in `out`, which no tool hides"""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Config):
    """Train a grid of SAEs on one harvest."""

    harvest: str
    """Folder of a finished harvest, or its URL."""
    out: str
    """Folder for the members' runs, one folder each, or a URL such as s3://bucket/name."""
    at_once: int = 8
    """Members that are trained on a batch before the next is read; bounds the memory."""
    plan: bool = False
    """Only say what it would take (steps, memory, disk, time), and write nothing."""
    base: dict[str, Any] = field(default_factory=dict)
    """Fields of a training file that all members share."""
    grid: tuple[dict[str, Any], ...] = ()
    """Tables of fields ("sae.kind", "sae.k", "seed", "site", ...); lists are multiplied out. layer
    (0-29, or a list) is put for {layer} in sites and other texts."""

    def __post_init__(self) -> None:
        check_range("at_once", self.at_once, low=1)
        if not self.grid:
            raise InputError("a sweep needs at least one [[grid]] table", where="grid")


def members(config: SweepConfig) -> dict[str, TrainConfig]:
    """Every member's configuration by name, in the order of the file.

    Raises InputError for unknown fields, or for two members of one name.
    """
    found: dict[str, TrainConfig] = {}
    for number, table in enumerate(config.grid):
        where = f"grid[{number}]"
        for chosen in _product(table):
            name = _name(chosen, table)
            if not _NAME.fullmatch(name) or name == MEMBERS:
                raise InputError(
                    "a member's name is that of its folder, and cannot be this one",
                    where=where,
                    given=name,
                )
            if name in found:
                raise InputError(
                    "two members are alike; give them a distinguishing `name`",
                    where=where,
                    given=name,
                )
            values = _merged(config.base, {})
            for key, value in chosen.items():
                if key not in ("name", LAYER):
                    _put(values, key, value, where)
            values = _at_layer(values, chosen.get(LAYER), where)
            values |= {"harvest": config.harvest, "out": str(as_path(config.out) / name)}
            values.setdefault("data_seed", 0)  # one order of batches for all
            found[name] = from_dict(TrainConfig, values, f"{where}, member {name}")
    return found


def read_members(folder: AnyPath) -> dict[str, Any]:
    """The settings of a sweep's members by name; ArtefactError if the file is damaged."""
    path = folder / MEMBERS
    found = read_json(path)
    if not isinstance(found, dict):
        raise DamagedError("is no list of members", where=str(path))
    if "members" not in found and SEAL not in found:
        return found
    check_seal(found, must=True, where=str(path))
    check_schema(found.get("schema"), supported=MEMBERS_SCHEMA, where=str(path))
    return found["members"]


@system_errors()
def sweep(config: SweepConfig) -> list[AnyPath]:
    """Train every member that is not trained yet; the members' folders.

    Of several processes each trains some members, and all return when all members are trained.

    Raises InputError as a single run does, before anything is trained, and ArtefactError if another
    process trains the sweep, or one of its members, or if rank 0 of several is gone. Several
    processes train into an object store only if torchrun starts them.
    """
    if this_rank().number == 0:
        return _sweep(config)
    try:
        with silent():
            return _sweep(config)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # rank 0 says what there is to say


def _sweep(config: SweepConfig) -> list[AnyPath]:
    harvest = open_complete(config.harvest)
    streams: dict[str, Stream] = {}
    runs = {name: Run(each, harvest, streams=streams) for name, each in members(config).items()}
    if config.plan:
        if this_rank().number == 0:
            for line in describe(list(runs.values()), at_once=config.at_once):
                say(line)
        return []
    out = shared(config.out) if this_rank().size > 1 else as_path(config.out)
    with _at_work(out, runs) as team:
        _train_all(list(runs.values()), harvest, streams, config.at_once, team)
    return [run.folder for run in runs.values()]


@contextmanager
def _at_work(out: AnyPath, runs: dict[str, Run]) -> Iterator[Team | None]:
    """Take part in a sweep: as rank 0, which holds its lock and lists its members, or another.

    None for a process that is alone. Raises InputError if rank 0 has other members.
    """
    if this_rank().number:
        with member(out, "a sweep") as team:
            team.wait_for(lambda: team.led() or _all_finished(runs) or None)
            listed = read_members(out)
            for name, run in runs.items():
                if listed.get(name) != json.loads(json.dumps(run.settings)):
                    raise InputError(
                        "rank 0 sweeps other members, or with other settings",
                        where=str(out),
                        given=name,
                    )
            yield team
        return
    with locked(out, "sweep"):
        _list_members(out, runs)
        left = isinstance(out, Path) and ranks_file(out).exists()
        if this_rank().size == 1 and not left:
            yield None
            return
        with member(out, "a sweep") as team:
            team.begin()
            yield team


def _list_members(out: AnyPath, runs: dict[str, Run]) -> None:
    """Write the members' settings, beside those of other files for this folder."""
    listed = out / MEMBERS
    before = read_members(out) if exists(listed) else {}
    found = {**before, **{name: run.settings for name, run in runs.items()}}
    write_sealed(listed, {"schema": MEMBERS_SCHEMA, "members": found})


def _train_all(
    runs: Sequence[Run],
    harvest: ActivationStore,
    streams: dict[str, Stream],
    at_once: int,
    team: Team | None,
) -> None:
    """Train what nobody has, until all is trained, here or by other ranks."""
    beginnings = {key: stream.state_dict() for key, stream in streams.items()}
    alike, ranks = Counter(run.stream_key() for run in runs), this_rank().size
    most = {key: min(at_once, math.ceil(count / ranks)) for key, count in alike.items()}
    waiting, waits = runs, pauses()
    while waiting := [run for run in waiting if not run.finished()]:
        group = _take(waiting, most, team)
        if not group:
            if team is not None:
                team.check()
            next(waits)
            continue
        done = len(runs) - len(waiting)
        say(f"{done} of {len(runs)} trained; now {', '.join(run.folder.name for run in group)}")
        # made again, so that their trainers are let go of when they are done
        again = [Run(run.config, harvest, streams=streams) for run in group]
        with ExitStack() as stack:
            for run in again:
                stack.enter_context(run.locked())
            _train_together(again, beginnings[group[0].stream_key()])


def _take(waiting: Sequence[Run], most: Mapping[str, int], team: Team | None) -> list[Run]:
    """Runs of one stream that this process is to train: none that another rank has.

    They are this process's until it ends, so that nobody trains them again.

    Args: most says how many at once, of each stream.
    """
    group: list[Run] = []
    key = ""
    for run in waiting:
        if group and len(group) == most[key]:
            break
        if group and run.stream_key() != key:
            continue
        key = run.stream_key()
        if (team is None or team.claim(_number(run))) and not run.finished():
            group.append(run)
    return group


def _train_together(runs: Sequence[Run], beginning: dict[str, Any]) -> None:
    """Train runs that share a stream, each from its own last checkpoint."""
    standing = []
    for run in runs:
        run.stream.load_state_dict(beginning)
        run.start()  # takes the shared stream to where this run's checkpoint was
        standing.append((run.trainer.step, run.stream.state_dict()))
    step, state = min(standing, key=lambda each: each[0])
    runs[0].stream.load_state_dict(state)
    last = max(run.total_steps for run in runs)
    with Progress("training", last, "steps", done=step) as progress:
        for raw in itertools.islice(iter(runs[0].stream), last - step):
            # a member whose checkpoint is later waits for the stream to come there
            notes = [
                run.trainer.advance(raw)
                for run in runs
                if run.trainer.step == step and not run.trainer.finished
            ]
            step += 1
            progress.advance(1, next(filter(None, notes), ""))
    for run in runs:
        run.release()


def _all_finished(runs: Mapping[str, Run]) -> bool:
    return all(run.finished() for run in runs.values())


def _number(run: Run) -> int:
    """What ranks call a run, whichever of the sweep's runs they have found finished."""
    return int(sha256_json(run.folder.name)[:15], 16)


def _at_layer(value: Any, layer: int | None, where: str) -> Any:
    """The values with a layer's number put for {layer} in every text."""
    if isinstance(value, Mapping):
        return {key: _at_layer(each, layer, where) for key, each in value.items()}
    if isinstance(value, list):
        return [_at_layer(each, layer, where) for each in value]
    if not isinstance(value, str) or _LAYER_HERE not in value:
        return value
    if layer is None:
        raise InputError("needs a layer in this table", where=where, given=value)
    return value.replace(_LAYER_HERE, str(layer))


def _layers(value: Any) -> list[int]:
    """The layers that a table names: one, a list, or text such as 0-29 or 0,3,6-8."""
    numbers: list[Any]
    try:
        numbers = layers_of(value) if isinstance(value, str) else value
    except ValueError:
        numbers = [value]
    numbers = numbers if isinstance(numbers, list) else [numbers]
    if not all(type(each) is int and each >= 0 for each in numbers):
        raise InputError(
            "no layers",
            where=f"grid: {LAYER}",
            given=value,
            allowed='3, [0, 3], "0-29" or "0,3,6-8"',
        )
    return numbers


def _product(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if LAYER in table:
        table = {**table, LAYER: _layers(table[LAYER])}
    lists = [value if isinstance(value, list) else [value] for value in table.values()]
    if any(not values for values in lists):
        raise InputError("an empty list gives no members", where="grid", given=dict(table))
    for values in itertools.product(*lists):
        yield dict(zip(table, values, strict=True))


def _name(chosen: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """The kind, and every field that varies in the member's table."""
    varying = [key for key, value in table.items() if isinstance(value, list) or key == LAYER]
    first = chosen.get("name", chosen.get("sae.kind", "sae"))
    rest = [
        f"{key.rpartition('.')[2]}={_short(chosen[key])}"
        for key in varying
        if key not in ("sae.kind", "name")
    ]
    return "-".join([str(first), *rest]).replace("/", "_")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    out = {k: _merged(v, {}) if isinstance(v, Mapping) else v for k, v in first.items()}
    return out | dict(second)


def _put(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    *path, last = key.split(".")
    here: Any = values
    for table in path:
        here = here.setdefault(table, {})
        if not isinstance(here, dict):
            raise InputError(f"{table} is not a table", where=where, given=key)
    here[last] = value
