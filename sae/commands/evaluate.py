"""`saescope eval`: an SAE on held-out text, under a protocol that is written down and hashed."""

from collections.abc import Mapping, Sequence
from typing import Any

from sae.commands.evaluate_config import EvaluateConfig
from sae.commands.evaluate_texts import (
    table_lines,
    write_tables,
)
from sae.commands.evaluation_files import check_metric_table, write_metrics
from sae.commands.held_out import HeldOut
from sae.evaluation import Family, chosen
from sae.evaluation.unfinished_file import Unfinished
from sae.evaluation.written import read_evaluation, report
from sae.formats.hub import evaluation_file
from saescope.artefact import read_json, write_report
from saescope.errors import ArtefactError
from saescope.paths import AnyPath, as_path, exists
from saescope.progress import say
from saescope.replacing import Kind, check_replaceable
from saescope.seals import sealed
from saescope.system import system_errors


def _is_evaluation(path: AnyPath) -> bool:
    found = read_json(path)
    return isinstance(found, dict) and "protocol_hash" in found


EVALUATION = Kind("an evaluation", _is_evaluation)


@system_errors()
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print and write the families of metrics that apply; the written dictionary.

    Raises InputError if the harvest does not fit the SAE, for a family that is unknown or was asked
    for and does not apply, or if there is another evaluation, or something else, where it is to be
    written; ArtefactError if either cannot be read.
    """
    path = as_path(config.out) if config.out is not None else evaluation_file(config.run)
    check_replaceable(path, EVALUATION, replace=True)
    check_metric_table(path)
    wanted = chosen(config.metrics, config.suite)
    data = HeldOut.open(config, unfinished=Unfinished(path))
    if not config.replace and _says_otherwise(path, data, wanted):  # before minutes of measuring
        check_replaceable(path, EVALUATION, replace=False)
    result = data.measure(wanted)
    try:
        write_evaluation(path, result, data)
    finally:  # what was measured is told, wherever it cannot be written
        for line in (*report(result), *table_lines(data.tables)):
            say(line)
    return result


def _says_otherwise(path: AnyPath, data: HeldOut, wanted: Sequence[Family]) -> bool:
    """Whether an evaluation is there that was measured otherwise, or is damaged."""
    if not (exists(path) and EVALUATION.holds(path)):
        return False
    try:
        return not data.measured_in(read_evaluation(path), wanted)
    except ArtefactError:
        return True


def write_evaluation(path: AnyPath, result: Mapping[str, Any], data: HeldOut) -> None:
    """Write what was measured, and tables of it and of families; the errors of `evaluate`."""
    write_report(path, sealed(result), EVALUATION, replace=data.config.replace)
    write_metrics(path, sealed(result), data.config.run, data.sae)
    write_tables(path, data.tables, result["protocol_hash"])
    if data.unfinished is not None:
        data.unfinished.forget()
