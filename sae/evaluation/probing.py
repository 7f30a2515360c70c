"""Sparse probing: how well k features tell a label of a text, beside five baselines.

Definitions are in `sae.probing`; the protocol is docs/reference/probing.md. The questions are those
of Gurnee et al. 2023 and Kantamneni et al. 2025.
"""

from collections.abc import Hashable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.evaluation import OwnTexts, metric_family
from sae.evaluation.on_texts import OnTexts
from sae.evaluation.paired import unit_by_unit
from sae.kernels.codes import SparseCodes
from sae.probing import suite, tables, text_rows
from sae.probing.config import ProbingConfig
from sae.probing.labelled_sets import labelled_sets
from sae.probing.representations import untrained
from saescope.metrics import Metric

KS = (1, 2, 5, 16)
"""numbers of features that have a metric of their own; others are in the tables"""
_UNTRAINED_SEED = 0
_CONTROLS = ("random", "untrained", "pca")
"""methods that are controls; random is as many of the SAE's features drawn by chance"""
_SOURCE = "Kantamneni et al. 2025, section 3"


def _features(k: int) -> str:
    return "one feature" if k == 1 else f"{k} features"


METRICS = (
    *(
        Metric(
            name=f"probing_auc_k{k}",
            label=f"probe AUC, k={k}",
            better="higher",
            help=f"How well a logistic regression on {_features(k)} tells labels of held-out "
            "texts: area under the ROC curve, 0.5 by chance, mean over sets. The features are "
            "those of largest standardised mean difference on training texts.",
            source=_SOURCE,
            interval=True,
        )
        for k in KS
    ),
    *(
        Metric(
            name=f"probing_above_untrained_k{k}",
            label=f"above untrained, k={k}",
            form="+.4f",
            better="higher",
            help=f"Probe AUC on {_features(k)} less that of an untrained SAE of the same shape, "
            "mean over sets.",
            interval=True,
        )
        for k in KS
    ),
    Metric(
        name="probing_auc_raw",
        label="probe AUC, raw",
        better="neither",
        help="The same on all coordinates of the activations: what a dense probe reaches.",
        interval=True,
    ),
    Metric(
        name="probing_accuracy_k16",
        label="probe accuracy, k=16",
        form=".1%",
        better="higher",
        help="Share of held-out texts whose label a logistic regression on 16 features calls "
        "right, mean over sets.",
        interval=True,
    ),
)


def facts(config: ProbingConfig, model: Mapping[str, Any], site: str) -> dict[str, Any]:
    """Settings, and what decides the rows of texts, with the sha256 of every file of them."""
    sets = labelled_sets(config.sets)
    return {
        **suite.protocol(config),
        "rows": text_rows.protocol(model, site, config.representation, config.max_tokens),
        "sets": {
            name: [asdict(origin) for origin in source.origins()] for name, source in sets.items()
        },
    }


@metric_family(
    "probing",
    needs="texts",
    metrics=METRICS,
    suite="probing",
    texts=OwnTexts(
        settings=ProbingConfig,
        facts=facts,
        counted=("sets", "sets of labelled texts"),
        unit="sets",
        write=tables.write_tables,
        lines=tables.lines,
        controls={
            f"probing_auc_k{k}": {method: f"probing_auc_k{k}_{method}" for method in _CONTROLS}
            for k in KS
        },
    ),
)
def probing(given: OnTexts[ProbingConfig]) -> dict[str, Any]:
    """Probe all sets; the rows of results go into `given.tables`.

    Raises InputError for unknown sets, or if none has texts enough.
    """
    config = given.settings
    fresh = untrained(given.sae, given.some_rows(), _UNTRAINED_SEED)

    def encode(sae: SparseAutoencoder, x: Tensor) -> SparseCodes:
        return sae.encode_sparse(given.seen(x))

    probed = suite.Probed(
        encode=partial(encode, given.sae),
        untrained=partial(encode, fresh),
        sae=given.sae_hash,
        cache=given.row_cache(config.representation, config.max_tokens),
    )
    rows = suite.probe_sets(labelled_sets(config.sets), probed, config)
    given.tables["probing"] = rows
    suite.forget_results(probed)
    return summary(rows)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics, of the normal setting; `sae.probing.tables` has all settings and methods."""
    sets = tables.by_set(rows)
    table = tables.over_sets(sets)
    found: dict[str, Any] = {"sets": len({row["set"] for row in rows})}
    for row in table:
        if row["setting"] != "normal" or (row["method"] != "raw" and row["k"] not in KS):
            continue
        k = row["k"]
        if row["method"] == "sae":
            found |= _with_interval(f"probing_auc_k{k}", row, "auc")
            found |= _with_interval(f"probing_above_untrained_k{k}", row, "above_untrained")
            if k == 16:
                found |= _with_interval("probing_accuracy_k16", row, "accuracy")
        elif row["method"] in _CONTROLS:
            name = f"probing_auc_k{k}_{row['method']}"
            found |= _with_interval(name, row, "auc")
            found |= unit_by_unit(name, _by_set(sets, "sae", k), _by_set(sets, row["method"], k))
        elif row["method"] == "raw":
            found |= _with_interval("probing_auc_raw", row, "auc")
    return found


def _by_set(sets: list[dict[str, Any]], method: str, k: int) -> dict[Hashable, float]:
    """The AUC of each set in the normal setting, over seeds."""
    wanted = ("normal", method, k)
    return {
        row["set"]: row["auc"]
        for row in sets
        if (row["setting"], row["method"], row["k"]) == wanted
    }


def _with_interval(name: str, row: dict[str, Any], value: str) -> dict[str, Any]:
    return {name: row[value], f"{name}_interval": row[f"{value}_interval"]}
