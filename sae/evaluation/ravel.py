"""RAVEL: features of one attribute of an entity, swapped for another entity's.

Definitions are in `sae.ravel`; the protocol is docs/reference/evaluation.md. The questions are
those of Huang et al. 2024 (arXiv 2402.17700) and of SAEBench (Karvonen et al. 2025).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sae.evaluation import OwnTexts, metric_family
from sae.evaluation.on_texts import OnTexts
from sae.evaluation.paired import unit_by_unit
from sae.probing.family_file import FamilyFile
from sae.probing.representations import untrained
from sae.probing.scores import mean_and_interval
from sae.ravel.config import RavelConfig
from sae.ravel.questions import Answers
from sae.ravel.suite import Row, measure, protocol
from saescope.artefact import sha256_json
from saescope.errors import InputError
from saescope.metrics import Metric
from saescope.paths import AnyPath, remove

_UNTRAINED_SEED = 0
_HUANG = "Huang et al. 2024 (arXiv 2402.17700), section 3"

METRICS = (
    Metric(
        name="ravel_disentangle",
        label="RAVEL disentangle",
        better="higher",
        help="Mean of cause and isolation. A half is what a swap of nothing has, and one of "
        "everything: read it beside random features.",
        source=_HUANG,
        interval=True,
    ),
    Metric(
        name="ravel_cause",
        label="RAVEL cause",
        form=".1%",
        better="higher",
        help="How often an answer about an entity's attribute becomes another entity's, when the "
        "features of that attribute are taken from the other one; mean over attributes.",
        source=_HUANG,
        interval=True,
    ),
    Metric(
        name="ravel_isolation",
        label="RAVEL isolation",
        form=".1%",
        better="higher",
        help="How often answers about the entity's other attributes stay as they were; mean over "
        "attributes.",
        source=_HUANG,
        interval=True,
    ),
    Metric(
        name="ravel_disentangle_random",
        label="RAVEL, random",
        better="neither",
        help="Disentangle of as many features that were drawn by chance.",
        interval=True,
    ),
    Metric(
        name="ravel_disentangle_untrained",
        label="RAVEL, untrained",
        better="neither",
        help="Disentangle of an SAE of the same shape that was never trained.",
        interval=True,
    ),
    Metric(
        name="ravel_cause_activation",
        label="RAVEL cause, whole",
        form=".1%",
        better="neither",
        help="Cause when the whole activation is swapped: the most that features at this site and "
        "position could cause.",
        interval=True,
    ),
)


def facts(config: RavelConfig, model: Mapping[str, Any], site: str) -> dict[str, Any]:
    """Settings, definitions, and what decides the model's answers."""
    names = ("weights_hash", "tokenizer_hash", "dtype")
    return {**protocol(config), "model": {name: model[name] for name in names}, "site": site}


FILE = FamilyFile("ravel", "a table of attributes", "by_attribute")


def write_table(evaluation: AnyPath, rows: Sequence[Row], protocol_hash: str) -> None:
    """Write the rows beside an evaluation's file; see `FamilyFile.write`."""
    FILE.write(evaluation, protocol_hash, {"by_attribute": list(rows)})


def table_lines(rows: Sequence[Row]) -> Iterator[str]:
    """The rows for people, a line each."""
    for row in rows:
        features = "" if row["k"] is None else f"{row['k']} features"
        yield (
            f"  {row['kind']}'s {row['attribute']:<10} {row['method']:<11}{features:<14}"
            f"cause {row['cause']:>6.1%}  isolation {row['isolation']:>6.1%}  "
            f"disentangle {row['disentangle']:.3f}"
        )


@metric_family(
    "ravel",
    needs="texts",
    metrics=METRICS,
    suite="ravel",
    texts=OwnTexts(
        settings=RavelConfig,
        facts=facts,
        counted=("pairs", "pairs of entities"),
        unit="attributes",
        write=write_table,
        lines=table_lines,
        controls={
            "ravel_disentangle": {
                "random": "ravel_disentangle_random",
                "untrained": "ravel_disentangle_untrained",
            }
        },
    ),
)
def ravel(given: OnTexts[RavelConfig]) -> dict[str, Any]:
    """Measure all attributes; a row for each and each method goes into `given.tables`.

    Raises InputError for an SAE whose reconstructions are not of the model's own activations at the
    site (a transcoder, one behind a lens), and if the model knows too little.
    """
    if given.sae.transcodes or given.sae.metadata.get("lens"):
        what = "a transcoder" if given.sae.transcodes else "behind a tuned lens"
        raise InputError(
            f"ravel is of SAEs that reconstruct the model's activations, and this is {what}",
            where="suite",
            given="ravel",
        )
    config = given.settings
    decided = facts(config, given.model.facts(), given.site)
    kept = given.cache / f"ravel-{sha256_json([decided, given.sae_hash])[:16]}"
    answers = Answers(model=given.model, site=given.site)
    fresh = untrained(given.sae, given.some_rows(), _UNTRAINED_SEED)
    rows = measure(answers, given.sae, fresh, config, kept)
    given.tables["ravel"] = rows
    remove(kept)
    return summary(rows)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The metrics: means over attributes, with intervals of Student's t, attributes as the unit."""
    of = {
        "ravel_disentangle": ("sae", "disentangle"),
        "ravel_cause": ("sae", "cause"),
        "ravel_isolation": ("sae", "isolation"),
        "ravel_disentangle_random": ("random", "disentangle"),
        "ravel_disentangle_untrained": ("untrained", "disentangle"),
        "ravel_cause_activation": ("activation", "cause"),
    }
    found: dict[str, Any] = {
        "attributes": sum(row["method"] == "sae" for row in rows),
        "pairs": sum(row["pairs"] for row in rows if row["method"] == "sae"),
    }
    for name, (method, value) in of.items():
        own = [row[value] for row in rows if row["method"] == method]
        found[name], found[f"{name}_interval"] = mean_and_interval(own)
    by_method = {
        method: {
            (row["kind"], row["attribute"]): row["disentangle"]
            for row in rows
            if row["method"] == method
        }
        for method in ("sae", "random", "untrained")
    }
    for method in ("random", "untrained"):
        name = f"ravel_disentangle_{method}"
        found |= unit_by_unit(name, by_method["sae"], by_method[method])
    return found
