"""Evaluations of the SAEs that the explorer knows of: a run's own, or what a store carries."""

from dashboards.catalogue import Entry
from dashboards.reports.measured import Evaluation, read_measured
from dashboards.run_folders import EVALUATION


def is_measured(entry: Entry) -> bool:
    """Whether there is an evaluation of this SAE, be it damaged."""
    return _has_file(entry) or bool(entry.metrics)


def evaluation_of(entry: Entry) -> Evaluation:
    """The evaluation in its run's folder, or else the metrics that its store has from one.

    Raises ArtefactError if the run's is damaged.
    """
    if entry.folder is not None and _has_file(entry):
        return read_measured(entry.folder / EVALUATION, entry.name)
    return Evaluation(
        name=entry.name,
        found={"protocol_hash": entry.protocol, "carried": dict(entry.metrics)},
        table=entry.table,
        families={},
        about={"architecture": entry.architecture, "d_sae": entry.d_sae},
    )


def _has_file(entry: Entry) -> bool:
    return entry.folder is not None and (entry.folder / EVALUATION).is_file()
