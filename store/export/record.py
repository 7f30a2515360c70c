"""All that a store and its annotations say of features, for export."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from store.annotations import Annotation, Annotations
from store.fact_results import Enrichment, HeadNorm, Layer, LayerShare
from store.feature_store import FeatureStore
from store.machine_labels import MachineLabel
from store.results import Coactivation, Example, Feature, Histogram, Logits, Neighbour
from store.summaries import BINS, INTERVAL_EXAMPLES, INTERVALS, TOP_EXAMPLES

_MOST_AT_ONCE = 64
_TOKENS_AT_ONCE = 1 << 20
_EXAMPLES = TOP_EXAMPLES + INTERVALS * INTERVAL_EXAMPLES


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
    [found] = read_records(store, notes, [number], window)
    return found


def read_records(
    store: FeatureStore, notes: Annotations, numbers: Sequence[int], window: int | None = None
) -> Iterator[FeatureRecord]:
    """Read features in this order, some at once in shared queries; see `read_record`.

    Cost: 1 to 2 ms a feature, where `read_record` takes about 15. The next ones are read while the
    caller works on these.
    """
    size = _at_once(store)
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    if len(batches) == 1:  # no thread for one feature
        yield from _read_batch(store, notes, batches[0], window)
        return
    with ThreadPoolExecutor(1, "read-records") as pool:
        coming: Future[list[FeatureRecord]] | None = None
        for batch in batches:
            read, coming = coming, pool.submit(_read_batch, store, notes, batch, window)
            yield from read.result() if read else ()
        yield from coming.result() if coming else ()


def _at_once(store: FeatureStore) -> int:
    """How many features share queries: few enough for their sequences, 60 bytes a token."""
    return max(min(_MOST_AT_ONCE, _TOKENS_AT_ONCE // (_EXAMPLES * store.context)), 1)


def _read_batch(
    store: FeatureStore, notes: Annotations, numbers: Sequence[int], window: int | None
) -> list[FeatureRecord]:
    features, histograms = store.statistics_of(numbers), store.histograms_of(numbers)
    examples = store.examples_of(numbers, window=window)
    logits, neighbours = store.logits_of(numbers), store.neighbours_of(numbers)
    coactivating = store.coactivating_of(numbers)
    named = {
        n: list(dict.fromkeys([n, *(e.feature for e in [*neighbours[n], *coactivating[n]])]))
        for n in numbers
    }
    every = sorted(set().union(*named.values()))
    top_tokens, labels = store.top_tokens(every, 3), notes.labels(every)
    annotations, machine = notes.get_several(numbers), notes.best_machine_labels(numbers)
    logit_histograms = store.logit_histograms_of(numbers) if store.has_facts else {}
    enrichments = store.enrichments_of(numbers) if store.has_facts else {}
    layers = _layers_of(store, numbers) if store.has_facts else {}
    heads = store.head_norms_of(numbers) if store.has_facts else {}
    records: list[FeatureRecord] = []
    for n in numbers:
        feature, histogram = features[n], histograms[n]
        record = FeatureRecord(
            feature=feature,
            histogram=histogram,
            logits=logits[n],
            top=[each for each in examples[n] if each.kind == "top"],
            intervals=[] if feature.dead else _intervals(feature, histogram, examples[n]),
            logit_histogram=logit_histograms.get(n),
            enrichments=enrichments.get(n, []),
            layers=layers.get(n, []),
            heads=heads.get(n, []),
            neighbours=neighbours[n],
            coactivating=coactivating[n],
            top_tokens={other: top_tokens[other] for other in named[n]},
            labels={other: labels[other] for other in named[n] if other in labels},
            annotation=annotations[n],
            machine_label=machine.get(n),
        )
        records.append(record)
    return records


def _intervals(
    feature: Feature, histogram: Histogram, examples: Sequence[Example]
) -> list[Interval]:
    counts = histogram.counts.reshape(INTERVALS, BINS // INTERVALS).sum(axis=1)
    width = feature.max / INTERVALS
    return [
        Interval(
            low=interval * width,
            high=(interval + 1) * width,
            count=int(counts[interval]),
            examples=[e for e in examples if e.kind == "interval" and e.interval == interval],
        )
        for interval in range(INTERVALS - 1, -1, -1)
    ]


def _layers_of(
    store: FeatureStore, numbers: Sequence[int]
) -> dict[int, list[tuple[Layer, LayerShare]]]:
    layers = store.layers()
    profiles = store.layer_profiles_of(numbers)
    return {n: [(layers[each.layer], each) for each in mine] for n, mine in profiles.items()}


def figures(value: float) -> float:
    """A number with the six figures that a 32-bit float surely has, for short JSON.

    >>> figures(0.30000001192092896)
    0.3
    """
    return float(f"{value:.6g}")
