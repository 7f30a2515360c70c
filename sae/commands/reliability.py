"""`saescope eval RUN... --reliability`: the smallest difference that each metric can tell.

The runs differ in nothing but their seed. Each is measured on all held-out documents, which is its
evaluation, and on each of five groups of them; families with texts and a seed of their own, with
several seeds, the first of which is the evaluation's. `sae.evaluation.reliability` says what is
made of these figures. Each group of each run is kept in reliability.unfinished until all are
measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae.analysis.as_trained import Rows
from sae.commands.evaluate_config import EvaluateConfig
from sae.commands.held_out import HeldOut
from sae.data.placement import Placement
from sae.evaluation import Family
from sae.evaluation.comparison import check_one_protocol, differing, in_words
from sae.evaluation.floors_file import RELIABILITY_FILE, SCHEMA
from sae.evaluation.reliability import FEWEST, Floor, floor
from sae.evaluation.unfinished_file import Unfinished
from sae.evaluation.written import ROWS, measured_values, rows_of, sections
from sae.formats.hub import SCHEME
from sae.training.run_folder import identity, read_run
from saescope.errors import InputError, SaescopeError
from saescope.paths import AnyPath, as_path
from saescope.progress import say, silent
from saescope.seals import sealed

GROUPS = 5
"""groups of documents, or seeds of a metric"""
_DEALT = 0
"""seed by which documents are dealt to the groups"""
_SEEDS = ("seed", "data_seed")


def seeds_of_runs(names: Sequence[str]) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    """The seeds of runs that differ in nothing else, by name, and the settings they share.

    Raises InputError for fewer than 3, for one that is no trained run, for what else differs, and
    for two of the same seeds.
    """
    if len(names) < FEWEST:
        raise InputError(
            f"needs {FEWEST} runs or more, better five, that differ in nothing but their seed",
            where="reliability",
            given=len(names),
        )
    seeds: dict[str, dict[str, int]] = {}
    common: dict[str, Any] = {}
    for name in names:
        manifest = _manifest(name)
        settings = identity(manifest["config"])
        own = [settings.pop(key, None) for key in _SEEDS]
        seed = own[0] or 0
        seeds[name] = {"seed": seed, "data_seed": seed if own[1] is None else own[1]}
        settings["harvest"] = manifest["parent"]
        found = differing(common or settings, settings)
        if found:
            raise InputError(
                f"{names[0]} and {name} differ in more than their seed: {in_words(found)}",
                where="reliability",
            )
        common = settings
        for other in list(seeds)[:-1]:
            if seeds[other] == seeds[name]:
                raise InputError(
                    f"{other} and {name} have the same seeds, and so are one run twice",
                    where="reliability",
                    given=seeds[name],
                )
    return seeds, common


def _manifest(name: str) -> dict[str, Any]:
    why = "is on the hub, which has no runs with a seed" if name.startswith(SCHEME) else ""
    if not why:
        try:
            return read_run(as_path(name))
        except SaescopeError as error:
            why = f"is no trained run: {error}"
    raise InputError(f"{name} {why}", where="reliability", allowed="folders of trained runs")


def reliability_file(names: Sequence[str], out: str | None) -> AnyPath:
    """Where it is written if nobody says: beside the first of the runs."""
    return as_path(names[0]).parent / RELIABILITY_FILE if out is None else as_path(out)


def measure_reliability(
    runs: Sequence[EvaluateConfig],
    evaluations: Mapping[str, Mapping[str, Any]],
    wanted: Sequence[Family],
    *,
    metric_seeds: int = GROUPS,
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """What reliability.json is to hold, from the runs' evaluations under one protocol.

    Args:
        metric_seeds: seeds of each family that has one, the evaluation's among them.
        unfinished: keeps the figures of each group, and has those measured before.

    Raises InputError for evaluations of two protocols, and the errors of `seeds_of_runs`.
    """
    seeds, common = seeds_of_runs([run.run for run in runs])
    check_one_protocol(evaluations)
    groups = []
    for number, run in enumerate(runs, 1):
        with silent():
            data = _Groups(**vars(HeldOut.open(run, unfinished=unfinished)))
            evaluation = evaluations[run.run]
            groups.append(
                [
                    data.values_of(group, wanted, evaluation, metric_seeds)
                    for group in range(max(GROUPS, metric_seeds))
                ]
            )
        say(f"{number} of {len(runs)}  {run.run}: measured on {GROUPS} groups of its documents")
    first = evaluations[runs[0].run]
    floors = _floors([measured_values(evaluations[run.run]) for run in runs], groups, first)
    return sealed(
        {
            "schema": SCHEMA,
            "kind": "reliability",
            "protocol": first["protocol"],
            "protocol_hash": first["protocol_hash"],
            "runs": [{"run": name, **own} for name, own in seeds.items()],
            "varied": [key for key in _SEEDS if len({own[key] for own in seeds.values()}) > 1],
            "settings": common,
            "groups": GROUPS,
            "metric_seeds": metric_seeds,
            "confidence": 0.95,
            "floors": {
                name: {each.name: getattr(found, each.name) for each in fields(Floor)}
                for name, found in floors.items()
            },
            **({ROWS: first[ROWS]} if ROWS in first else {}),
        }
    )


def _floors(
    values: Sequence[Mapping[str, Any]],
    groups: Sequence[Sequence[Mapping[str, Any]]],
    evaluation: Mapping[str, Any],
) -> dict[str, Floor]:
    """The floor of each metric that has a figure of every run; the others are named."""
    of_documents = {
        name
        for section in sections(evaluation).values()
        if "rows" in section or "tokens" in section
        for name in section
    }
    found = {}
    for name, row in rows_of(evaluation).items():
        own = [each[name] for each in values if each.get(name) is not None]
        if not own:
            continue
        if len(own) < len(values):
            missing = len(values) - len(own)
            say(f"{row.label} is undefined of {missing} of {len(values)} runs: left out")
            continue
        again = [
            {g: x for g, group in enumerate(each) if (x := group.get(name)) is not None}
            for each in groups
        ]
        shares = name in of_documents
        fewest = GROUPS if shares else 2
        whole = len(again[0]) >= fewest and all(each.keys() == again[0].keys() for each in again)
        by_run = [list(each.values()) for each in again] if whole else ()
        found[name] = floor(own, by_run, shares=shares)
    return found


def _with_seed(
    config: EvaluateConfig, of_texts: Sequence[Family], number: int
) -> tuple[EvaluateConfig, list[Family]]:
    """The configuration with other seeds of families with texts, and the families that have one."""
    kinds = {family.texts.settings: family for family in of_texts if family.texts is not None}
    changed, seeded = {}, []
    for each in fields(config):
        settings = getattr(config, each.name)
        if type(settings) in kinds and hasattr(settings, "seed"):
            changed[each.name] = replace(settings, seed=settings.seed + number)
            seeded.append(kinds[type(settings)])
    return replace(config, **changed), seeded


@dataclass(frozen=True, kw_only=True)
class _Groups(HeldOut):
    """An SAE and the held-out part of a harvest, of which one group of documents is measured."""

    chosen: list[int] = field(default_factory=lambda: [0])
    """the group that is measured now"""
    dealt: dict[str, Tensor] = field(default_factory=dict)
    """documents of each group by what is measured, "rows" or "sequences" """

    def values_of(
        self,
        group: int,
        wanted: Sequence[Family],
        evaluation: Mapping[str, Any],
        metric_seeds: int = GROUPS,
    ) -> dict[str, Any]:
        """The values of one group of documents, and with one seed of families that have one; none
        where there are fewer groups or seeds, and of families that there are too few documents for.

        Args: evaluation is of all documents, and with the first seed of families that have one.
        """
        self.chosen[0] = group
        of_rows, of_model, of_texts = self._applying(wanted)
        found: dict[str, Any] = {family.section: None for family in wanted}
        config, seeded = _with_seed(self.config, of_texts, group)
        if not group:  # the seed of the evaluation
            found.update({family.section: evaluation[family.section] for family in seeded})
        dealt = {"group": [group, GROUPS], "dealt": _DEALT}
        if group >= GROUPS:
            of_rows, of_model = [], []
        if of_rows and self._enough("rows", self._documents()):
            about = {"rows": self.config.most_rows, **self._settings(of_rows), **dealt}
            self._part(of_rows, about, self.measure_rows, found)
        if of_model and self._enough("sequences", self._first_documents()):
            for family in of_model:
                about = {**self._model_facts(), **self._settings([family]), **dealt}
                self._part([family], about, self.measure_model, found)
        other = replace(self, config=config)
        for family in seeded if 0 < group < metric_seeds else ():
            other._part([family], other._text_facts([family]), other.measure_texts, found)
        return measured_values(found)

    def _enough(self, what: str, documents: Tensor) -> bool:
        """Deal documents to the groups; whether there are as many as groups."""
        if what not in self.dealt:
            there = documents.unique()
            generator = torch.Generator().manual_seed(_DEALT)
            self.dealt[what] = there[torch.randperm(len(there), generator=generator)]
        return len(self.dealt[what]) >= GROUPS

    def _group(self, what: str) -> Tensor:
        """The documents of the group that is measured."""
        return self.dealt[what][self.chosen[0] :: GROUPS]

    def _documents(self) -> Tensor:
        """The documents of the rows, one or more times each."""
        if "rows" in self.dealt:
            return self.dealt["rows"]
        all_rows = super()._rows(self.placement)
        known = [piece.document for piece in all_rows()]
        return torch.cat([each for each in known if each is not None] or [torch.zeros(0)])

    def _first_documents(self) -> Tensor:
        """The document that each sequence begins with, by which it is dealt."""
        first = np.asarray(self.harvest.document[super()._sequences()])[:, 0]
        return torch.from_numpy(first).long()

    def _rows(self, placement: Placement, training: int | None = None) -> Rows:
        rows = super()._rows(placement, training)
        if training is not None:
            return rows
        group = self._group("rows")
        return lambda: (
            piece.rows(torch.isin(piece.document, group))
            for piece in rows()
            if piece.document is not None
        )

    def _sequences(self) -> NDArray[np.int64]:
        within = torch.isin(self._first_documents(), self._group("sequences"))
        return super()._sequences()[within.numpy()]
