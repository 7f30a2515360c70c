"""Targeted probe perturbation, beside what would look the same without any training.

Definitions are in `sae.probing.perturbation`; the protocol, and what an audit found of this metric,
are docs/reference/removal.md.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from sae.evaluation import OwnTexts, metric_family
from sae.evaluation.on_texts import OnTexts, subject_of
from sae.evaluation.paired import unit_by_unit
from sae.probing import perturbation, text_rows
from sae.probing.divisions import TEST_SHARE
from sae.probing.kept_rows import Row, kept_rows
from sae.probing.labelled_sets import labelled_sets
from sae.probing.logistic import STRENGTHS
from sae.probing.perturbation import group_of, tpp_by_division, tpp_rows, tpp_scores
from sae.probing.removal_config import AUDIT, TPPConfig
from sae.probing.removal_tables import removal_lines, write_removal
from saescope.artefact import sha256_json
from saescope.metrics import Metric
from saescope.paths import AnyPath, remove
from saescope.progress import Progress

SHOWN = (5, 20, 100)
"""numbers of features that have a metric of their own; others are in the table"""
METRICS = (
    *(
        Metric(
            name=f"tpp_n{n}",
            label=f"TPP, n={n}",
            form="+.3f",
            better="higher",
            help=f"How much more accuracy a class's probe loses than the others' do when {n} "
            "features of the class are ablated; mean over groups, divisions as the unit. " + AUDIT,
            source="Karvonen et al. 2024 (arXiv 2411.18895)",
            interval=True,
        )
        for n in SHOWN
    ),
    *(
        Metric(
            name=f"tpp_n20_{method}",
            label=f"TPP, n=20, {method}",
            form="+.3f",
            better="neither",
            help=f"The same with 20 {what}: a score of the SAE that is not above says nothing.",
            interval=True,
        )
        for method, what in (
            ("random", "of the SAE's features drawn at random"),
            ("untrained", "features of an SAE of the same shape that was never trained"),
        )
    ),
    Metric(
        name="tpp_n20_unintended",
        label="TPP, n=20, others",
        form="+.3f",
        better="neither",
        help="Accuracy that the other classes' probes lose when 20 features of one are ablated.",
        interval=True,
    ),
)


def facts(config: TPPConfig, model: Mapping[str, Any], site: str) -> dict[str, Any]:
    """Settings, and what decides the rows of texts, with the sha256 of every file of them."""
    return {
        **_settings(config),
        "rows": text_rows.protocol(model, site, config.representation, config.max_tokens),
        "sets": {
            pattern: {
                name: [asdict(origin) for origin in source.origins()]
                for name, source in labelled_sets([pattern]).items()
            }
            for pattern in config.groups
        },
    }


def _settings(config: TPPConfig) -> dict[str, Any]:
    return {
        "version": perturbation.VERSION,
        **{name: getattr(config, name) for name in ("classes", "ns", "seeds", "texts")},
        "test_share": TEST_SHARE,
        "strengths": STRENGTHS,
        "error": "kept",
    }


def _write(evaluation: AnyPath, rows: list[Row], protocol_hash: str) -> None:
    write_removal(evaluation, "tpp", tpp_scores(rows), rows, protocol_hash)


@metric_family(
    "tpp",
    needs="texts",
    metrics=METRICS,
    suite="tpp",
    texts=OwnTexts(
        settings=TPPConfig,
        facts=facts,
        counted=("groups", "groups of classes of texts"),
        unit="divisions",
        write=_write,
        lines=lambda rows: removal_lines("TPP", "tpp", tpp_scores(rows)),
        controls={"tpp_n20": {"random": "tpp_n20_random", "untrained": "tpp_n20_untrained"}},
    ),
)
def tpp(given: OnTexts[TPPConfig]) -> dict[str, Any]:
    """Measure all groups; the rows of results go into `given.tables`.

    Raises InputError for a transcoder, an unknown set, or a group with too few texts.
    """
    config = given.settings
    subject = subject_of(given, "tpp", config.representation, config.max_tokens)
    kept = given.cache / f"results-tpp-{given.sae_hash[:16]}"
    rows: list[Row] = []
    with Progress("targeted perturbation", len(config.groups), "groups") as progress:
        for pattern in config.groups:
            sets = {name: each.read() for name, each in labelled_sets([pattern]).items()}
            group = group_of(pattern, sets, config.classes, config.texts)
            measure = partial(tpp_rows, group, subject, config.ns, config.seeds)
            key = [_settings(config), pattern, group.texts, group.label.tolist(), *subject.key()]
            rows += kept_rows(kept / f"{sha256_json(key)[:32]}.json", measure, pattern)
            progress.advance(note=pattern)
    given.tables["tpp"] = rows
    remove(kept)
    return summary(rows)


def summary(rows: list[Row]) -> dict[str, Any]:
    """The metrics; the table has all groups, methods and numbers of features."""
    found: dict[str, Any] = {"groups": len({row["group"] for row in rows})}
    for row in tpp_scores(rows):
        if row["group"] is not None:
            continue
        name = f"tpp_n{row['n']}" + ("" if row["method"] == "sae" else f"_{row['method']}")
        if any(name == metric.name for metric in METRICS):
            found |= {name: row["tpp"], f"{name}_interval": row["tpp_interval"]}
            if row["method"] != "sae":
                each = (
                    tpp_by_division(rows, method, row["n"]) for method in ("sae", row["method"])
                )
                found |= unit_by_unit(name, *each)
        if name == "tpp_n20":
            found |= {
                "tpp_n20_unintended": row["unintended"],
                "tpp_n20_unintended_interval": row["unintended_interval"],
            }
    return found
