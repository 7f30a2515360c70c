"""`saescope eval RUN --controls`: an SAE beside what every metric has to rank below it.

The controls (`sae.evaluation.controls`) are measured as the SAE is, under its protocol, and
controls.json beside the evaluation says how each metric ranks them. Suites with texts of their own
have measured controls beside the SAE, which are taken from the evaluation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sae.commands.evaluate_config import EvaluateConfig
from sae.commands.held_out import HeldOut
from sae.evaluation import Family
from sae.evaluation.controls import controls
from sae.evaluation.controls_file import KIND, SCHEMA
from sae.evaluation.ranks import CONTROLS, DIFFERENCE, TRAINED, ranking
from sae.evaluation.unfinished_file import Unfinished
from sae.evaluation.written import ROWS, measured_values, rows_of
from saescope.artefact import sha256_json
from saescope.errors import InputError
from saescope.metrics import Metric
from saescope.progress import say, silent
from saescope.seals import sealed

_ROWS = 16_384
"""training rows that PCA, thresholds and the untrained SAE are made with"""
_SEED = 0


def measure_controls(
    run: EvaluateConfig,
    evaluation: Mapping[str, Any],
    wanted: Sequence[Family],
    *,
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """What controls.json is to hold, of an SAE and its evaluation with these families.

    Args: unfinished keeps the figures of each control, and has those measured before.

    Raises InputError for an SAE that there are no controls of (`sae.evaluation.controls`).
    """
    data = _Control(**vars(HeldOut.open(run, unfinished=unfinished)))
    if data.pooled:
        raise InputError(
            "controls are of one site: give site", where="controls", given=list(data.sites)
        )
    of_texts = {family.name: family.texts for family in wanted if family.texts is not None}
    own = [pair for texts in of_texts.values() for pair in texts.controls.items()]
    beside = {value for _, by_control in own for value in by_control.values()}
    rows = {name: row for name, row in rows_of(evaluation).items() if name not in beside}
    values = {TRAINED: _figures(evaluation, rows)}
    others = [family for family in wanted if family.texts is None]
    protocol: dict[str, Any] = {"of_texts": "by the suites themselves"} if of_texts else {}
    if others:
        seen = torch.cat([piece.x for piece in data.training()])
        protocol |= {"rows": len(seen), "seed": _SEED}
        values |= data.of_controls(seen, others, rows)
    for name, by_control in own:
        for control, value in by_control.items():
            values.setdefault(control, {}).update(_renamed(evaluation, value, name))
    protocol = {**evaluation["protocol"], "controls": protocol}
    of_any = {name for control in CONTROLS for name in values.get(control, {})}
    measured = [row for name, row in rows.items() if name in of_any & values[TRAINED].keys()]
    return sealed(
        {
            "schema": SCHEMA,
            "kind": KIND,
            "protocol": protocol,
            "protocol_hash": sha256_json(protocol),
            "evaluation": evaluation["protocol_hash"],
            "values": {name: values[name] for name in (TRAINED, *CONTROLS) if name in values},
            "ranks": {row.name: ranking(row, values) for row in measured},
            **({ROWS: evaluation[ROWS]} if ROWS in evaluation else {}),
        }
    )


def _renamed(evaluation: Mapping[str, Any], value: str, name: str) -> dict[str, Any]:
    """A value of an evaluation by another name, with its interval and how far the SAE is above it;
    nothing if it is not there."""
    values = measured_values(evaluation)
    ends = ("", "_interval", f"_{DIFFERENCE}", f"_{DIFFERENCE}_interval")
    pairs = ((f"{name}{end}", f"{value}{end}") for end in ends)
    return {new: values[old] for new, old in pairs if old in values}


def _figures(evaluation: Mapping[str, Any], rows: Mapping[str, Metric]) -> dict[str, Any]:
    """The metrics of an evaluation, with their intervals."""
    values = measured_values(evaluation)
    names = [each for name in rows for each in (name, f"{name}_interval")]
    return {name: values[name] for name in names if name in values}


@dataclass(frozen=True, kw_only=True)
class _Control(HeldOut):
    """The held-out part of a harvest, on which several SAEs are measured."""

    def of_controls(
        self, seen: Tensor, wanted: Sequence[Family], rows: Mapping[str, Metric]
    ) -> dict[str, dict[str, Any]]:
        """The figures of each control by its name.

        Args: seen are training rows [n, d_in], as the SAE sees them.
        """
        found = {}
        for name, control in controls(self.placement.sae, seen, seed=_SEED):
            site, placement = next(iter(self.sites.items()))
            with silent():
                sites = {site: placement._replace(sae=control)}
                found[name] = _figures(replace(self, sites=sites).measure(wanted), rows)
            say(f"{self.config.run}: measured the control {name}")
        return found

    def training(self) -> Any:
        """Rows of the training split, as training saw them."""
        return self._rows(self.placement, _ROWS)()
