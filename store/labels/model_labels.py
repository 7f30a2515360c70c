"""Labelling features with a language model, and saying beforehand what that would ask of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from saescope.artefact import sha256_json
from store.annotations import Annotations
from store.feature_store import FeatureStore
from store.labels.endpoint import Client, Usage
from store.labels.explanations import top_token
from store.labels.label import LabelSettings
from store.labels.language_model import (
    EXPLANATION_TOKENS,
    SHOWN_TOGETHER,
    VERDICT_TOKENS,
    Judged,
    explain_messages,
    fuzzed_marks,
    judge,
    judge_messages,
    read_explanation,
    tokens_of,
    window_texts,
)
from store.labels.scores import detection
from store.labels.windows import Sampler, Split
from store.machine_labels import MachineLabel

SHOWN = 20
"""windows that the explainer sees"""
_PROMPTS = 1
"""version of the prompts, which is part of what a label was made with"""
_TYPICAL = "a phrase of some ten words about what the feature may stand for"


@dataclass(frozen=True)
class ModelLabeller:
    """Labels a store's features through a client."""

    store: FeatureStore
    client: Client
    settings: LabelSettings
    concurrency: int = 4

    @property
    def method(self) -> str:
        """What labels are saved under: the model's name."""
        return self.client.endpoint.model

    @property
    def made_with(self) -> str:
        """A hash of all that decides a label."""
        of = [self.settings.made_with(self.store), self.client.endpoint.url, self.method]
        return sha256_json([*of, SHOWN, _PROMPTS])[:16]

    def run(
        self, notes: Annotations, features: Sequence[int], *, replace: bool = False
    ) -> Iterator[int]:
        """Label features and save each as it is done; yields how many more are.

        Those that have a label made with the same settings are passed over, unless `replace`.
        """
        sampler = Sampler(self.store, size=self.settings.window, seed=self.settings.seed)
        done = set[int]() if replace else notes.machine_labelled(self.method, self.made_with)
        other = ""
        for number in features:
            if number in done:
                saved = [m for m in notes.machine_labels([number]) if m.method == self.method]
                other = saved[0].label
            else:
                split = _split(sampler, number, self.settings)
                if split.fit.active.any():
                    label = self.label(number, split, other)
                    notes.set_machine_labels([label])
                    other = label.label
            yield 1

    def label(self, feature: int, split: Split, other: str) -> MachineLabel:
        """Explain a feature, and score the explanation by detection and by fuzzing.

        other: another feature's explanation, whose detection score is the baseline (shuffled).
        """
        maximum = self.store.feature(feature).max
        messages = explain_messages(self.store.vocabulary, split.fit, maximum, SHOWN)
        answer = self.client.ask(messages, max_tokens=EXPLANATION_TOKENS)
        explanation = read_explanation(answer)[:200]
        found = self._judged(feature, explanation, split, maximum, fuzzing=False)
        fuzzing = self._judged(feature, explanation, split, maximum, fuzzing=True)
        shuffled = self._judged(feature, other, split, maximum, fuzzing=False) if other else None
        held_out = split.held_out
        baseline = top_token(split.fit)
        token = baseline and detection(held_out.active, baseline.strength(held_out))
        details = {
            "made_with": self.made_with,
            "auc": found.score and found.score.auc,
            "fuzzing": fuzzing.score and fuzzing.score.balanced_accuracy,
            "shuffled": shuffled and shuffled.score and shuffled.score.balanced_accuracy,
            "top_token": token and token.balanced_accuracy,
            "unreadable": found.unreadable + fuzzing.unreadable,
            "windows": [int(held_out.active.sum()), int((~held_out.active).sum())],
            "window": self.settings.window,
        }
        score = found.score and found.score.balanced_accuracy
        return MachineLabel(
            feature=feature, method=self.method, label=explanation, score=score, details=details
        )

    def _judged(
        self, feature: int, explanation: str, split: Split, maximum: float, *, fuzzing: bool
    ) -> Judged:
        random = np.random.default_rng([self.settings.seed, feature, int(fuzzing)])
        windows = split.held_out
        marks = fuzzed_marks(windows, maximum, random) if fuzzing else None
        return judge(
            self.client,
            explanation,
            windows,
            window_texts(self.store.vocabulary, windows, marks),
            fuzzing=fuzzing,
            random=random,
            concurrency=self.concurrency,
        )


def _split(sampler: Sampler, feature: int, settings: LabelSettings) -> Split:
    return sampler.sample(feature, fit=2 * settings.windows, held_out=settings.windows)


def estimate(store: FeatureStore, settings: LabelSettings, features: Sequence[int]) -> Usage:
    """What labelling these features would ask of a model; nothing is sent.

    Tokens are estimated from the prompts' lengths; the answers are taken to be as long as they may.
    """
    sampler = Sampler(store, size=settings.window, seed=settings.seed)
    usage = Usage()
    for place, number in enumerate(features):
        split = _split(sampler, number, settings)
        if not split.fit.active.any():
            continue
        prompt = explain_messages(store.vocabulary, split.fit, store.feature(number).max, SHOWN)
        texts = window_texts(store.vocabulary, split.held_out)
        rounds = 3 if place else 2  # detection, fuzzing, and shuffled labels but for the first
        batches = [texts[i : i + SHOWN_TOGETHER] for i in range(0, len(texts), SHOWN_TOGETHER)]
        judged = sum(tokens_of(judge_messages(_TYPICAL, b, fuzzing=False)) for b in batches)
        usage.requests += 1 + rounds * len(batches)
        usage.tokens_in += tokens_of(prompt) + rounds * judged
        usage.tokens_out += EXPLANATION_TOKENS + rounds * len(batches) * VERDICT_TOKENS
    return usage
