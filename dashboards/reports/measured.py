"""Evaluations of SAEs, read with the tables that lie beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae.evaluation.controls_file import controls_file, read_controls
from sae.evaluation.metric_table import read_metric_table
from sae.evaluation.written import measured_values, read_evaluation, rows_of, sections
from sae.probing.family_file import beside
from saescope.artefact import DamagedError, check_seal, read_json
from saescope.errors import ArtefactError
from saescope.metrics import Metric, shown_with_interval
from saescope.paths import AnyPath, exists

_TABLES = ("probing", "absorption", "ravel", "scr", "tpp", "unlearning")
"""families whose tables are shown"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured on one SAE."""

    name: str
    found: Mapping[str, Any]
    """what evaluation.json says"""
    table: Mapping[str, Metric]
    """the rows of its metrics"""
    families: Mapping[str, Mapping[str, Any]]
    """tables of families, by family"""
    about: Mapping[str, Any]
    """architecture, d_in, d_sae and sae_hash; empty for one of an older version"""
    path: AnyPath | None = None
    """its file; None where a store carries it"""
    controls: Mapping[str, Any] | None = None
    """what controls.json says, if there is one of this evaluation"""
    problems: tuple[str, ...] = ()
    """why tables that are there are not shown"""

    @property
    def protocol_hash(self) -> str:
        """The hash of how it was measured."""
        return str(self.found.get("protocol_hash", ""))

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """What was measured, by section."""
        return sections(self.found)

    def value(self, name: str) -> float | None:
        """A metric's value; None if it was not measured, or is undefined."""
        value = measured_values(self.found).get(name)
        return float(value) if isinstance(value, int | float) else None

    def half(self, name: str) -> float | None:
        """Half of its 95% interval, if it has one."""
        return self.value(f"{name}_interval")

    def shown(self, section: str, row: Metric) -> str:
        """A metric of a section with its interval; empty if it was not measured."""
        values = self.sections.get(section, {})
        return shown_with_interval(row, values) if row.name in values else ""


def read_measured(path: AnyPath, name: str) -> Evaluation:
    """An evaluation's file, and the tables beside it.

    Raises ArtefactError if the evaluation is missing or damaged; of a damaged table, and of one of
    another evaluation, `problems` tells.
    """
    found = read_evaluation(path)
    problems: list[str] = []
    families: dict[str, Mapping[str, Any]] = {}
    about: dict[str, Any] = {}
    try:
        for row in read_metric_table(path, found)[:1]:
            about = {key: row[key] for key in ("architecture", "d_in", "d_sae", "sae_hash")}
    except ArtefactError as error:
        problems.append(str(error))
    for family in _TABLES:
        file = beside(path, f"{family}.json")
        try:
            if family in sections(found) and exists(file):
                families[family] = _family_table(file, found.get("protocol_hash"))
        except ArtefactError as error:
            problems.append(str(error))
    controls = None
    try:
        if exists(controls_file(path)):
            controls = _controls(controls_file(path), found.get("protocol_hash"))
    except ArtefactError as error:
        problems.append(str(error))
    return Evaluation(
        name=name,
        found=found,
        table=rows_of(found),
        families=families,
        about=about,
        path=path,
        controls=controls,
        problems=(*problems,),
    )


def _controls(path: AnyPath, protocol_hash: Any) -> dict[str, Any]:
    found = read_controls(path)
    if found.get("evaluation") != protocol_hash:
        raise DamagedError("is of another evaluation than the one beside it", where=str(path))
    return found


def _family_table(path: AnyPath, protocol_hash: Any) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise DamagedError("is no table of an evaluation", where=str(path))
    check_seal(found, must=True, where=str(path))
    if found.get("protocol_hash") != protocol_hash:
        raise DamagedError("is of another evaluation than the one beside it", where=str(path))
    return found
