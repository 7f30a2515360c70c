"""`saescope eval RUN --controls`: an SAE beside what every metric has to rank below it.

The controls (`sae.evaluation.controls`) are measured as the SAE is, under its protocol, and
controls.json beside the evaluation says how each metric ranks them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sae.commands.evaluate_config import EvaluateConfig
from sae.commands.held_out import HeldOut
from sae.evaluation import Family
from sae.evaluation.controls import TRAINED, controls, ranking
from sae.evaluation.controls_file import KIND, SCHEMA
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
    rows = rows_of(evaluation)
    values = {TRAINED: _figures(evaluation, rows)}
    seen = torch.cat([piece.x for piece in data.training()])
    for name, control in controls(data.placement.sae, seen, seed=_SEED):
        site, placement = next(iter(data.sites.items()))
        with silent():
            found = replace(data, sites={site: placement._replace(sae=control)}).measure(wanted)
        values[name] = _figures(found, rows)
        say(f"{run.run}: measured the control {name}")
    protocol = {**evaluation["protocol"], "controls": {"rows": len(seen), "seed": _SEED}}
    measured = [row for name, row in rows.items() if name in values[TRAINED]]
    return sealed(
        {
            "schema": SCHEMA,
            "kind": KIND,
            "protocol": protocol,
            "protocol_hash": sha256_json(protocol),
            "evaluation": evaluation["protocol_hash"],
            "values": values,
            "ranks": {row.name: ranking(row, values) for row in measured},
            **({ROWS: evaluation[ROWS]} if ROWS in evaluation else {}),
        }
    )


def _figures(evaluation: Mapping[str, Any], rows: Mapping[str, Metric]) -> dict[str, Any]:
    """The metrics of an evaluation, with their intervals."""
    values = measured_values(evaluation)
    names = [each for name in rows for each in (name, f"{name}_interval")]
    return {name: values[name] for name in names if name in values}


@dataclass(frozen=True, kw_only=True)
class _Control(HeldOut):
    """The held-out part of a harvest, and one of several SAEs that are measured on it."""

    def training(self) -> Any:
        """Rows of the training split, as training saw them."""
        return self._rows(self.placement, _ROWS)()
