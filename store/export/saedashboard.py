"""SAEDashboard's JSON: `batch-N.json` files as its Neuronpedia runner writes them.

The keys are those of `NeuronpediaDashboardBatch` and `NeuronpediaDashboardFeature` in SAEDashboard
(sae_dashboard/neuronpedia/neuronpedia_dashboard.py). What a store does not have is left empty:
neuron alignment, correlated neurons, the decoder vector.

Two things differ on purpose. Intervals exclude zero and do not overlap, where SAEDashboard's lowest
one counts all inactive tokens; and examples are one a sequence, whole sequences, and never at
position 0 or special tokens.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saescope.errors import InputError
from store.annotations import Annotations
from store.export.record import FeatureRecord, figures, read_records
from store.feature_store import FeatureStore
from store.results import Example

BATCH = 128
"""features of a file"""


def layer_number(store: FeatureStore, given: int | None) -> int:
    """The layer as given, or the number in the name of the store's site; InputError for neither."""
    found = re.search(r"\d+", str(store.meta.get("site") or ""))
    if given is None and found is None:
        raise InputError(
            "the site's name has no layer's number; give --layer",
            where="layer",
            given=store.meta.get("site"),
        )
    return int(found[0]) if given is None and found else int(given or 0)


def write_saedashboard(
    folder: Path,
    store: FeatureStore,
    notes: Annotations,
    features: Sequence[int],
    *,
    layer: int | None = None,
    source_set: str | None = None,
) -> Iterator[int]:
    """Write `batch-N.json` files into a folder; yields how many more features are written."""
    head = {
        "model_id": str(store.meta.get("model") or ""),
        "layer": layer_number(store, layer),
        "sae_set": source_set or str(store.meta.get("name") or "saescope"),
        "sae_id_suffix": None,
    }
    for batch, first in enumerate(range(0, len(features), BATCH)):
        chosen = features[first : first + BATCH]
        rows = [dashboard_feature(store, each) for each in read_records(store, notes, chosen)]
        text = json.dumps({**head, "features": rows}, ensure_ascii=False, allow_nan=False)
        (folder / f"batch-{batch}.json").write_text(text, encoding="utf-8")
        yield len(chosen)


def dashboard_feature(store: FeatureStore, record: FeatureRecord) -> dict[str, Any]:
    """One feature as SAEDashboard describes it."""
    overview, edges = store.overview(), record.histogram.edges
    pos, neg = record.logits.top, record.logits.bottom
    return {
        "feature_index": record.feature.feature,
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [each.feature for each in record.coactivating],
        "correlated_features_l1": [],
        "correlated_features_pearson": [figures(c.correlation) for c in record.coactivating],
        "neg_str": [each.token for each in neg],
        "neg_values": [figures(each.value) for each in neg],
        "pos_str": [each.token for each in pos],
        "pos_values": [figures(each.value) for each in pos],
        "frac_nonzero": figures(record.feature.density),
        "freq_hist_data_bar_values": [figures(each) for each in (edges[:-1] + edges[1:]) / 2],
        "freq_hist_data_bar_heights": record.histogram.counts.tolist(),
        **logit_bars(record),
        "n_prompts_total": overview.n_sequences,
        "n_tokens_in_prompt": overview.context,
        "dataset": str((store.meta.get("corpus") or {}).get("source") or ""),
        "decoder_weights_dist": [figures(each.share) for each in record.heads],
        "activations": list(dashboard_activations(store, record)),
        "vector": [],
    }


def logit_bars(record: FeatureRecord) -> dict[str, list[Any]]:
    """The histogram of effects on all logits, as SAEDashboard and Neuronpedia call it."""
    found = record.logit_histogram
    heights, edges = ([], None) if found is None else (found.counts.tolist(), found.edges)
    middle = [] if edges is None else [figures(each) for each in (edges[:-1] + edges[1:]) / 2]
    return {"logits_hist_data_bar_heights": heights, "logits_hist_data_bar_values": middle}


def dashboard_activations(store: FeatureStore, record: FeatureRecord) -> Iterator[dict[str, Any]]:
    """The examples, strongest first, then by interval.

    bin_contains is the share of kept positions in the interval; SAEDashboard marks the strongest
    examples by bin_min and bin_contains of -1, and bin_max the maximum.
    """
    for example in record.top:
        yield _activation(example, -1.0, record.feature.max, -1.0)
    kept = max(store.overview().n_kept, 1)
    for interval in record.intervals:
        for example in interval.examples:
            yield _activation(example, interval.low, interval.high, interval.count / kept)


def _activation(example: Example, low: float, high: float, contains: float) -> dict[str, Any]:
    return {
        "bin_min": figures(low),
        "bin_max": figures(high),
        "bin_contains": figures(contains),
        "tokens": example.tokens,
        "values": [figures(value) for value in example.activations],
        "qualifying_token_index": example.index - example.start,
    }
