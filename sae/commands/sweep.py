"""`saescope sweep`: many SAEs, trained while the activations are read once.

A sweep file has a `base` (fields of a training file) and `grid` tables, in which a field may be a
list; each table's product of lists gives its members. Every member is a run like any other, in its
own folder, bit for bit what `saescope train` makes of the same settings.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activations import ActivationStore
from sae.data.harvests import open_complete
from sae.data.streams import Stream
from sae.training import process_group
from sae.training.config import TrainConfig
from sae.training.estimate import describe
from sae.training.run import Run
from saescope.artefact import SEAL, DamagedError, check_schema, check_seal, read_json
from saescope.config import Config, from_dict
from saescope.errors import InputError, check_range
from saescope.locks import locked
from saescope.paths import local
from saescope.progress import Progress, say
from saescope.seals import write_sealed
from saescope.system import system_errors

MEMBERS = "members.json"
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
    """Folder for the members' runs, one folder each."""
    at_once: int = 8
    """Members that are trained on a batch before the next is read; bounds the memory."""
    plan: bool = False
    """Only say what it would take (steps, memory, disk, time), and write nothing."""
    base: dict[str, Any] = field(default_factory=dict)
    """Fields of a training file that all members share."""
    grid: tuple[dict[str, Any], ...] = ()
    """Tables of fields ("sae.kind", "sae.k", "seed", "site", ...); lists are multiplied out."""

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
                if key != "name":
                    _put(values, key, value, where)
            values |= {"harvest": config.harvest, "out": str(local(config.out) / name)}
            values.setdefault("data_seed", 0)  # one order of batches for all
            found[name] = from_dict(TrainConfig, values, f"{where}, member {name}")
    return found


def read_members(folder: Path) -> dict[str, Any]:
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
def sweep(config: SweepConfig) -> list[Path]:
    """Train every member that is not trained yet; the members' folders.

    Raises InputError as a single run does, before anything is trained, and ArtefactError if another
    process trains the sweep, or one of its members.
    """
    with process_group.session():
        process_group.refuse_several("a sweep", where="torchrun")
    harvest = open_complete(config.harvest)
    streams: dict[str, Stream] = {}
    runs = {name: Run(each, harvest, streams=streams) for name, each in members(config).items()}
    if config.plan:
        for line in describe(list(runs.values()), at_once=config.at_once):
            say(line)
        return []
    with locked(config.out, "sweep"):
        return _train_all(config, harvest, runs, streams)


def _train_all(
    config: SweepConfig, harvest: ActivationStore, runs: dict[str, Run], streams: dict[str, Stream]
) -> list[Path]:
    listed = local(config.out) / MEMBERS  # with the members of other files for this folder
    before = read_members(listed.parent) if listed.exists() else {}
    found = {**before, **{name: run.settings for name, run in runs.items()}}
    write_sealed(listed, {"schema": MEMBERS_SCHEMA, "members": found})
    waiting: dict[str, list[Run]] = {}
    for run in runs.values():
        if not run.finished():
            waiting.setdefault(run.stream_key(), []).append(run)
    done = len(runs) - sum(map(len, waiting.values()))
    beginnings = {key: stream.state_dict() for key, stream in streams.items()}
    for key, alike in waiting.items():
        for group in _groups(alike, config.at_once):
            say(f"{done} of {len(runs)} trained; now {', '.join(run.folder.name for run in group)}")
            # made again, so that their trainers are let go of when they are done
            again = [Run(run.config, harvest, streams=streams) for run in group]
            with ExitStack() as stack:
                for run in again:
                    stack.enter_context(run.locked())
                _train_together(again, beginnings[key])
            done += len(group)
    return [run.folder for run in runs.values()]


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


def _groups(runs: list[Run], size: int) -> Iterator[list[Run]]:
    return (runs[start : start + size] for start in range(0, len(runs), size))


def _product(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in table.values()]
    if any(not values for values in lists):
        raise InputError("an empty list gives no members", where="grid", given=dict(table))
    for values in itertools.product(*lists):
        yield dict(zip(table, values, strict=True))


def _name(chosen: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """The kind, and every field that varies in the member's table."""
    varying = [key for key, value in table.items() if isinstance(value, list)]
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
