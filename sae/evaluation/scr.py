"""Spurious correlation removal, beside what would look the same without any training.

Definitions are in `sae.probing.spurious`; the protocol, and what an audit found of this metric, are
docs/reference/removal.md.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from sae.evaluation import OwnTexts, metric_family
from sae.evaluation.on_texts import OnTexts, subject_of
from sae.evaluation.paired import named
from sae.probing import spurious, text_rows
from sae.probing.divisions import TEST_SHARE
from sae.probing.kept_rows import Row, kept_rows
from sae.probing.labelled_sets import SetSource, labelled_sets
from sae.probing.logistic import STRENGTHS
from sae.probing.removal_config import AUDIT, BETWEEN, SCRConfig
from sae.probing.removal_tables import removal_lines, write_removal
from sae.probing.spurious import paired, scr_difference, scr_rows, scr_scores
from saescope.artefact import sha256_json
from saescope.errors import InputError
from saescope.metrics import Metric
from saescope.paths import AnyPath, remove
from saescope.progress import Progress

SHOWN = (5, 20, 100)
"""numbers of features that have a metric of their own; others are in the table"""
_SOURCE = "Karvonen et al. 2024 (arXiv 2411.18895)"
_NONE = "no pair whose biased probe is worse than the clean one"
METRICS = (
    *(
        Metric(
            name=f"scr_n{n}",
            label=f"SCR, n={n}",
            form="+.3f",
            better="higher",
            help="How much of the accuracy that a spurious attribute costs a probe comes back when "
            f"{n} features of that attribute are ablated; mean over pairs, divisions as the unit. "
            + AUDIT,
            source=_SOURCE,
            interval=True,
            undefined=_NONE,
        )
        for n in SHOWN
    ),
    *(
        Metric(
            name=f"scr_n20_{method}",
            label=f"SCR, n=20, {method}",
            form="+.3f",
            better="neither",
            help=f"The same with 20 {what}: a score of the SAE that is not above says nothing.",
            interval=True,
            undefined=_NONE,
        )
        for method, what in (
            ("random", "of the SAE's features drawn at random"),
            ("untrained", "features of an SAE of the same shape that was never trained"),
        )
    ),
    Metric(
        name="scr_gap",
        label="SCR, to be won",
        form=".3f",
        better="neither",
        help="Accuracy of the clean probe less that of the biased one, mean over pairs: what SCR "
        "is divided by. Where it is small, SCR is mostly noise.",
    ),
)


def _sources(config: SCRConfig) -> dict[str, tuple[SetSource, SetSource]]:
    found = {}
    for each in config.pairs:
        sides = []
        for name in each.split(BETWEEN):
            sets = labelled_sets([name])
            if len(sets) != 1:
                raise InputError(
                    "stands for several sets; a pair is of two", where="scr.pairs", given=name
                )
            sides += sets.values()
        found[each] = (sides[0], sides[1])
    return found


def facts(config: SCRConfig, model: Mapping[str, Any], site: str) -> dict[str, Any]:
    """Settings, and what decides the rows of texts, with the sha256 of every file of them."""
    return {
        **_settings(config),
        "rows": text_rows.protocol(model, site, config.representation, config.max_tokens),
        "sets": {
            name: [asdict(origin) for source in sources for origin in source.origins()]
            for name, sources in _sources(config).items()
        },
    }


def _settings(config: SCRConfig) -> dict[str, Any]:
    return {
        "version": spurious.VERSION,
        **{name: getattr(config, name) for name in ("ns", "seeds", "texts")},
        "test_share": TEST_SHARE,
        "strengths": STRENGTHS,
        "least_gap": spurious.LEAST_GAP,
        "error": "kept",
    }


def _write(evaluation: AnyPath, rows: list[Row], protocol_hash: str) -> None:
    write_removal(evaluation, "scr", scr_scores(rows), rows, protocol_hash)


@metric_family(
    "scr",
    needs="texts",
    metrics=METRICS,
    suite="scr",
    texts=OwnTexts(
        settings=SCRConfig,
        facts=facts,
        counted=("crossings", "pairs of attributes of texts"),
        unit="divisions",
        write=_write,
        lines=lambda rows: removal_lines("SCR", "scr", scr_scores(rows)),
        controls={"scr_n20": {"random": "scr_n20_random", "untrained": "scr_n20_untrained"}},
    ),
)
def scr(given: OnTexts[SCRConfig]) -> dict[str, Any]:
    """Measure all pairs; the rows of results go into `given.tables`.

    Raises InputError for a transcoder, an unknown set, or a pair with too few texts in common.
    """
    config = given.settings
    subject = subject_of(given, "scr", config.representation, config.max_tokens)
    kept = given.cache / f"results-scr-{given.sae_hash[:16]}"
    rows: list[Row] = []
    sources = _sources(config)
    with Progress("spurious correlations", len(sources), "pairs") as progress:
        for name, (first, second) in sources.items():
            pair = paired(first.read(), second.read(), config.texts)
            measure = partial(scr_rows, pair, subject, config.ns, config.seeds)
            key = [_settings(config), pair.name, pair.texts, pair.labels.tolist(), *subject.key()]
            rows += kept_rows(kept / f"{sha256_json(key)[:32]}.json", measure, name)
            progress.advance(note=name)
    given.tables["scr"] = rows
    remove(kept)
    return summary(rows)


def summary(rows: list[Row]) -> dict[str, Any]:
    """The metrics; the table has all pairs, methods and numbers of features."""
    scores = scr_scores(rows)
    found: dict[str, Any] = {"crossings": len({row["pair"] for row in rows})}
    for row in scores:
        if row["pair"] is not None:
            continue
        name = f"scr_n{row['n']}" + ("" if row["method"] == "sae" else f"_{row['method']}")
        if any(name == metric.name for metric in METRICS):
            found |= {name: row["scr"], f"{name}_interval": row["scr_interval"]}
            if row["method"] != "sae" and row["scr"] is not None:
                found |= named(name, *scr_difference(rows, "sae", row["method"], row["n"]))
    gaps = {row["pair"]: row["gap"] for row in scores if row["pair"] is not None}
    return {**found, "scr_gap": sum(gaps.values()) / len(gaps)}
