"""Labelling many features: explanations, their scores and baselines, saved block by block."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from saescope.artefact import sha256_json
from store.annotations import Annotations
from store.feature_store import FeatureStore
from store.labels.explanations import METHODS, Explainer, Explanation, top_token
from store.labels.scores import Detection, balanced_accuracy, detection
from store.labels.windows import Sampler, Split, Windows
from store.machine_labels import MachineLabel

_BLOCK = 256
"""features that are saved together, and lost if the process is killed"""
_OTHERS = 16
"""features whose labels are the shuffled ones"""


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How labels are made and scored."""

    methods: tuple[str, ...] = METHODS
    windows: int = 50
    """windows of each kind (active and silent) that a label is scored on; twice as many fit it"""
    window: int = 32
    """tokens of a window"""
    seed: int = 0

    def made_with(self, store: FeatureStore) -> str:
        """A hash of all that decides a label: these settings (but the methods), and the store."""
        own = {**asdict(self), "methods": None}
        of = [str(store.meta.get(key)) for key in ("sae_hash", "harvest", "n_activations")]
        return sha256_json([own, of])[:16]


class Labeller:
    """Makes and scores labels of one store's features."""

    def __init__(self, store: FeatureStore, settings: LabelSettings) -> None:
        self.store, self.settings = store, settings
        self.sampler = Sampler(store, size=settings.window, seed=settings.seed)
        self._explainer = Explainer(store)
        self._made_with = settings.made_with(store)
        live = np.array(store.live_features(), np.int64)
        random = np.random.default_rng(settings.seed)
        chosen = random.choice(live, min(_OTHERS, len(live)), replace=False).tolist()
        self._others = {
            number: {method: self._explain(method, number) for method in settings.methods}
            for number in chosen
        }

    def split(self, feature: int) -> Split:
        """The feature's windows to make labels from and to score them on."""
        count = self.settings.windows
        return self.sampler.sample(feature, fit=2 * count, held_out=count)

    def _explain(self, method: str, feature: int) -> Explanation | None:
        return self._explainer.explain(method, feature, self.split(feature).fit)

    def label(self, feature: int) -> list[MachineLabel]:
        """A label of each method that has something to say about the feature.

        Beside each score stand two baselines on the same held-out windows: the mean score of other
        features' labels by the same method (shuffled labels, chance being 0.5), and the score of
        the one commonest token (top token), which a good label should beat.
        """
        split = self.split(feature)
        found = []
        baseline = _score(top_token(split.fit), split.held_out)
        for method in self.settings.methods:
            explanation = self._explainer.explain(method, feature, split.fit)
            if explanation is None:
                continue
            own = _score(explanation, split.held_out)
            details = {
                "made_with": self._made_with,
                "fit": _fit(explanation, split.fit),
                "auc": own and own.auc,
                "shuffled": self._shuffled(method, feature, split.held_out),
                "top_token": baseline and baseline.balanced_accuracy,
                "top_token_auc": baseline and baseline.auc,
                "windows": [int(split.held_out.active.sum()), int((~split.held_out.active).sum())],
                "window": self.sampler.size,
            }
            found.append(
                MachineLabel(
                    feature=feature,
                    method=method,
                    label=explanation.text,
                    score=own and own.balanced_accuracy,
                    details=details,
                )
            )
        return found

    def _shuffled(self, method: str, feature: int, held_out: Windows) -> float | None:
        labels = [each[method] for number, each in self._others.items() if number != feature]
        scores = [_score(label, held_out) for label in labels if label is not None]
        known = [score.balanced_accuracy for score in scores if score is not None]
        return float(np.mean(known)) if known else None


def _score(explanation: Explanation | None, windows: Windows) -> Detection | None:
    if explanation is None:
        return None
    return detection(windows.active, explanation.strength(windows))


def _fit(explanation: Explanation, fit: Windows) -> float | None:
    active = fit.active
    if active.all() or not active.any():
        return None
    return balanced_accuracy(active, explanation.strength(fit) > 0)


def label_features(
    labeller: Labeller, notes: Annotations, features: Sequence[int], *, replace: bool = False
) -> Iterator[int]:
    """Label features and save the labels block by block; yields how many more features are done.

    Features that have labels made with the same settings are passed over, unless `replace`: a run
    that was interrupted goes on where it stood.
    """
    done: set[int] = set()
    if not replace:
        done = features_done(labeller, notes)
    left = [number for number in features if number not in done]
    yield len(features) - len(left)
    for begin in range(0, len(left), _BLOCK):
        labels: list[MachineLabel] = []
        for number in left[begin : begin + _BLOCK]:
            labels += labeller.label(number)
            yield 1
        if labels:
            notes.set_machine_labels(labels)


def features_done(labeller: Labeller, notes: Annotations) -> set[int]:
    """Features that have a label with these settings by every method that can say something.

    A method may have nothing to say about a feature; one label is then enough to show that the
    feature's turn has come, as all of a feature's labels are saved together.
    """
    settings = labeller.settings
    made_with = settings.made_with(labeller.store)
    by_method = [notes.machine_labelled(method, made_with) for method in settings.methods]
    return set[int]().union(*by_method)


def summary(labels: Sequence[MachineLabel], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Of each method the number of labels and the means of scores and baselines."""
    rows = []
    for method in methods:
        scored = [each for each in labels if each.method == method and each.score is not None]
        columns = {"score": [each.score for each in scored]}
        for name in ("auc", "shuffled", "top_token"):
            columns[name] = [each.details.get(name) for each in scored]
        means = {
            name: float(np.mean([v for v in values if v is not None] or [np.nan]))
            for name, values in columns.items()
        }
        rows.append({"method": method, "labels": len(scored), **means})
    return rows
