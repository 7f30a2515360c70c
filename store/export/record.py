"""All that a store and its annotations say of one feature, for export."""

from dataclasses import dataclass

from store.annotations import Annotation, Annotations
from store.fact_results import Enrichment, HeadNorm, Layer, LayerShare
from store.feature_store import FeatureStore
from store.machine_labels import MachineLabel
from store.results import Coactivation, Example, Feature, Histogram, Logits, Neighbour
from store.summaries import BINS, INTERVALS


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One of the equal intervals of (0, max], and random examples of it."""

    low: float
    high: float
    count: int
    """positions in it, of all kept positions"""
    examples: list[Example]


@dataclass(frozen=True, kw_only=True)
class FeatureRecord:
    """A feature's statistics, examples, effects, relatives and annotation."""

    feature: Feature
    histogram: Histogram
    logits: Logits
    top: list[Example]
    intervals: list[Interval]
    """from the strongest to the weakest"""
    logit_histogram: Histogram | None
    """None where the store has none"""
    enrichments: list[Enrichment]
    """topics and sources in which it fires more often than by chance"""
    layers: list[tuple[Layer, LayerShare]]
    """of an SAE of several, what the feature does at each"""
    heads: list[HeadNorm]
    neighbours: list[Neighbour]
    coactivating: list[Coactivation]
    top_tokens: dict[int, list[str]]
    """the commonest tokens of the strongest examples, of the feature and of its relatives"""
    labels: dict[int, str]
    """of the feature and of its relatives, where there are any"""
    annotation: Annotation
    machine_label: MachineLabel | None
    """the machines' best, if there is one"""


def read_record(
    store: FeatureStore, notes: Annotations, number: int, window: int | None = None
) -> FeatureRecord:
    """Read a feature; window: tokens shown on each side of an example, all without it.

    Raises InputError if there is no such feature.
    """
    feature, histogram = store.feature(number), store.histogram(number)
    counts = histogram.counts.reshape(INTERVALS, BINS // INTERVALS).sum(axis=1)
    width = feature.max / INTERVALS
    examples = store.examples(number, "interval", window)
    intervals = [
        Interval(
            low=interval * width,
            high=(interval + 1) * width,
            count=int(counts[interval]),
            examples=[each for each in examples if each.interval == interval],
        )
        for interval in range(INTERVALS - 1, -1, -1)
    ]
    neighbours, coactivating = store.neighbours(number), store.coactivating(number)
    named = list(dict.fromkeys([number, *(each.feature for each in [*neighbours, *coactivating])]))
    return FeatureRecord(
        feature=feature,
        histogram=histogram,
        logits=store.logits(number),
        top=store.examples(number, "top", window),
        intervals=[] if feature.dead else intervals,
        logit_histogram=store.logit_histogram(number) if store.has_facts else None,
        enrichments=store.enrichments(number) if store.has_facts else [],
        layers=_layers(store, number) if store.has_facts else [],
        heads=store.head_norms(number) if store.has_facts else [],
        neighbours=neighbours,
        coactivating=coactivating,
        top_tokens=store.top_tokens(named, 3),
        labels=notes.labels(named),
        annotation=notes.get(number),
        machine_label=notes.best_machine_labels([number]).get(number),
    )


def _layers(store: FeatureStore, number: int) -> list[tuple[Layer, LayerShare]]:
    layers = store.layers()
    return [(layers[each.layer], each) for each in store.layer_profile(number)]


def figures(value: float) -> float:
    """A number with the six figures that a 32-bit float surely has, for short JSON.

    >>> figures(0.30000001192092896)
    0.3
    """
    return float(f"{value:.6g}")
