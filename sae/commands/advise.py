"""`saescope advise`: short runs that say what a long one wants, and a training file of it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from activations import ActivationStore
from sae.bench.rows import processor
from sae.core.base import kind_of
from sae.data.harvests import open_complete
from sae.synthetic.config import PREFIX
from sae.synthetic.stream import world_hash
from sae.synthetic.world import World, named_world
from sae.training import process_group
from sae.training.advice import Advice, advise
from sae.training.config import TrainConfig
from sae.training.short_runs import Measured, ShortRuns, passes_of
from saescope.artefact import git_commit, library_versions, write_bytes, write_json
from saescope.config import to_dict
from saescope.errors import InputError, check_range
from saescope.metrics import metric
from saescope.paths import local
from saescope.progress import duration, say
from saescope.system import system_errors

FILE, MEASUREMENTS = "train.toml", "advice.json"
_START = 32.0
"""the L0 that the search begins with, where none is given"""


@dataclass(frozen=True, kw_only=True)
class AdviseConfig(TrainConfig):
    """Find out what a training run wants, by short runs of it."""

    minutes: float = 10.0
    """Minutes that the short runs may take together."""
    steps: int | None = None
    """Steps of each short run; as many as the minutes allow if not given, which are to be 200."""
    hours: float = 1.0
    """Hours that the long run may take on this machine."""
    folder: str | None = None
    """Folder for train.toml and advice.json; OUT-advice if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("minutes", self.minutes, above=0)
        check_range("hours", self.hours, above=0)
        if self.steps is not None:
            check_range("steps", self.steps, low=8)
        for name, given, default in (
            ("objective", self.objective, "reconstruction"),
            ("start_from", self.start_from, None),
        ):
            if given != default:
                raise InputError(
                    "advice is of new SAEs that reconstruct stored activations",
                    where=name,
                    given=given,
                    allowed="leave it out",
                )


@system_errors()
def run_advise(config: AdviseConfig) -> Advice | None:
    """Make the short runs, print what they say, and write it; None with `plan`.

    Raises InputError if there are files of advice in the folder, or too little time for runs of 200
    steps, and as `train` does.
    """
    process_group.refuse_several("advice", where="advise")
    folder = local(config.folder or f"{config.out}-advice")
    taken = [name for name in (FILE, MEASUREMENTS) if (folder / name).exists()]
    if taken:
        raise InputError(
            f"holds {taken[0]} already; choose another folder, or remove it", where=str(folder)
        )
    source = _source(config.harvest)
    # nothing is written there; what is in OUT is no concern of the short runs
    short = dataclasses.replace(config, out=str(folder / "short-run"))
    runs = ShortRuns(short, source, minutes=config.minutes, steps=config.steps)
    say(
        f"{kind_of(config.sae)} on {config.harvest}: short runs of {runs.steps:,} steps of "
        f"{config.trainer.batch_size:,} rows, {config.minutes:g} minutes at most"
    )
    if config.plan:
        return None
    start = config.trainer.target_l0 or (config.sae.k if config.sae.has_k else _START)  # type: ignore[attr-defined]
    found = advise(runs, start=float(start), hours=config.hours)
    train = advised(config, found, source)
    for line in (*table(found.measured), *_summary(found)):
        say(line)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / MEASUREMENTS,
        {
            "advice": found.to_dict(),
            "config": to_dict(config),
            "harvest_hash": world_hash(source) if isinstance(source, World) else source.hash,
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "libraries": library_versions(),
            "commit": git_commit(),
        },
    )
    write_bytes(folder / FILE, training_file(train).encode())
    say(f"written to {folder}; to train: saescope train {folder / FILE}")
    return found


def advised(config: TrainConfig, found: Advice, source: ActivationStore | World) -> TrainConfig:
    """The configuration of the long run."""
    trainer = dataclasses.replace(
        config.trainer, target_l0=found.target_l0, lr=found.lr, lr_multiplier=None
    )
    sae = dataclasses.replace(config.sae, d_sae=found.d_sae).with_target_l0(found.target_l0)
    names = {each.name for each in fields(TrainConfig)}
    values: dict[str, Any] = {
        **{name: value for name, value in vars(config).items() if name in names},
        "sae": sae,
        "trainer": trainer,
        "plan": False,
    }
    if isinstance(source, World):
        values["samples"] = found.steps * config.trainer.batch_size
    else:
        values["passes"] = round(passes_of(config, source, found.steps), 4)
    return TrainConfig.specialise({"sae": {"kind": kind_of(sae)}})(**values)


def table(measured: Sequence[Measured]) -> list[str]:
    """Lines of a table of the short runs."""
    head = ("asked L0", "features", "steps", "learning rate", "L0", "FVU", "dead", "similarity")
    rows = [_cells(each) for each in measured]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in (head, *rows)
    ]


def _cells(each: Measured) -> tuple[str, ...]:
    return (
        f"{each.target_l0:g}",
        f"{each.d_sae:,}",
        f"{each.steps:,}",
        f"{each.lr:.2g}",
        *(metric(name).shown(getattr(each, name)) for name in ("l0", "fvu", "dead_fraction")),
        f"{each.decoder_similarity:.5f}",
    )


def training_file(config: TrainConfig) -> str:
    """A training file in TOML, of what is not as it would be without a file."""
    kind = kind_of(config.sae)
    usual = type(config)(harvest="", out="")
    values = _changed(dataclasses.asdict(config), dataclasses.asdict(usual))
    values["sae"] = {"kind": kind, "d_sae": config.sae.d_sae, **values.get("sae", {})}
    return (
        "\n".join(["# Written by `saescope advise`, from short runs.", *_toml(values, "")]) + "\n"
    )


def _source(harvest: str) -> ActivationStore | World:
    return named_world(harvest) if harvest.startswith(PREFIX) else open_complete(harvest)


def _summary(found: Advice) -> list[str]:
    why = {
        "gain": "after which twice as many gain less than 1%",
        "time": "as many as the hours allow",
        "harvest": "ten passes over the harvest; more text would help",
    }
    told = {
        "similarity": "where decoder directions are least alike",
        "bend": "where FVU bends: further active features explain less each",
        "start": "as it was given: these runs do not tell (decoder directions are the less alike "
        "the higher L0 is, and FVU has no bend)",
    }
    return [
        f"L0             {found.target_l0:g}, {told[found.l0_from]}",
        f"learning rate  {found.lr:g}",
        f"width          {found.d_sae:,} features",
        f"tokens         {found.tokens:,} in {found.steps:,} steps: {why[found.limit]}",
        f"time           {duration(found.seconds)} on this machine",
    ]


def _changed(values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What differs, in nested tables; None cannot, as TOML has none and no default is left for it.

    >>> _changed({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2, "d": 4}})
    {'b': {'d': 3}}
    """
    found = {}
    for name, value in values.items():
        before = usual.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            inner = _changed(value, before)
            if inner:
                found[name] = inner
        elif value != before and value is not None:
            found[name] = value
    return found


def _toml(values: Mapping[str, Any], table: str) -> list[str]:
    """Lines of TOML: a table's own values, then the tables in it.

    >>> _toml({"a": 1, "b": {"c": "x", "d": {"e": [True, 2.0]}}}, "")
    ['a = 1', '', '[b]', 'c = "x"', '', '[b.d]', 'e = [true, 2.0]']
    """
    lines = [
        f"{k} = {json.dumps(v, ensure_ascii=False)}"
        for k, v in values.items()
        if not isinstance(v, Mapping)
    ]
    for name, value in values.items():
        if isinstance(value, Mapping):
            inner = f"{table}.{name}" if table else name
            lines += ["", f"[{inner}]", *_toml(value, inner)]
    return lines
