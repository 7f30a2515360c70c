"""`saescope harvest`: harvest, append to a harvest, or estimate what either would cost (--plan)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from activations.harvesting.append import append, is_there, planned_segment
from activations.harvesting.bring_command import BringCommand, run_bring
from activations.harvesting.config import HarvestConfig
from activations.harvesting.corpus_reader import CorpusReader
from activations.harvesting.pipeline import harvest
from activations.harvesting.plan import describe, planned_facts, refuse_too_much
from activations.harvesting.resume import existing_harvest, model_of
from activations.harvesting.segments import segments
from activations.storage.reader import ActivationStore
from saescope.paths import as_path
from saescope.process_rank import this_rank
from saescope.progress import say
from saescope.system import free_bytes


@dataclass(frozen=True, kw_only=True)
class HarvestCommand(HarvestConfig):
    """Run a model over text and store the activations of some sites."""

    SELECTORS: ClassVar[tuple[str, ...]] = ("rows_from",)
    SPELLED: ClassVar[Mapping[str, str]] = {"from": "rows_from"}

    plan: bool = False
    """Only say what it would take (rows, disk, memory, time), and write nothing."""

    append: bool = False
    """Add the activations of this corpus to the finished harvest in `out`, whose other settings
    must be these."""

    trust_remote_code: bool = False
    """Short for --model.trust-remote-code: run the code that comes with the model."""

    ignore_space: bool = False
    """Begin though it does not fit on the disk."""

    @classmethod
    def specialise(cls, values: Mapping[str, Any]) -> type[Self]:
        """Where rows come from a file, a command of its own."""
        return BringCommand if "rows_from" in values else cls  # type: ignore[return-value]


def run(command: HarvestCommand | BringCommand) -> ActivationStore | None:
    """Harvest or append, or, with `plan`, print what that would take and return None.

    Raises InputError and ArtefactError as `harvest` and `append` do, with `plan` too.
    """
    if isinstance(command, BringCommand):
        return run_bring(command)
    values = {f.name: getattr(command, f.name) for f in fields(HarvestConfig)}
    if command.trust_remote_code:
        values["model"] = replace(command.model, trust_remote_code=True)
    config = HarvestConfig(**values)
    if command.plan:
        if this_rank().number == 0:
            _say_plan(config, appends=command.append, ignore_space=command.ignore_space)
        return None
    work = append if command.append else harvest
    return work(config, ignore_space=command.ignore_space)


def _say_plan(config: HarvestConfig, *, appends: bool, ignore_space: bool) -> None:
    """Print what a harvest would take. InputError if it does not fit on the disk."""
    out = as_path(config.out)
    store = ActivationStore.open(out) if appends else existing_harvest(config, out)
    if store is not None and (is_there(config, store) if appends else store.complete):
        say(f"{out}: complete already, {store.n_rows():,} rows")
        return
    model = model_of(config, store)
    text, left = CorpusReader.of(config), {}
    facts: Mapping[str, Any]
    if store is None:
        facts = planned_facts(config, model)
        left = facts["planned_sequences"]
    elif appends and store.complete:
        facts = store.manifest
        left = planned_segment(config, model, store)["planned_sequences"]
    else:
        facts, segment = store.manifest, segments(store)[-1]
        text = CorpusReader.of(config, segment)
        for split, planned in segment.planned_sequences.items():
            windows = segment.windows(store, split)
            left[split] = planned - sum(store.windows[number].sequences for number in windows)
    lines, needed = describe(config, facts, left, text, model)
    for line in lines:
        say(line)
    if not ignore_space:
        refuse_too_much(needed, free_bytes(out), out)
