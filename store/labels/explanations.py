"""Explanations of a feature that need no language model: tokens, n-grams, topics, logits.

Each is made from the windows to fit, is a text that a person can read, and is a rule that predicts
in which windows the feature fires.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.feature_store import FeatureStore
from store.labels.scores import balanced_accuracy
from store.labels.windows import Windows
from store.vocabulary import Vocabulary

METHODS = ("token", "ngram", "topic", "logit")
_MOST, _CANDIDATES, _LEAST_GAIN = 5, 24, 0.01
_EFFECTS = 5
Gram = tuple[int, ...]


@dataclass(frozen=True)
class Explanation:
    """What a feature stands for, in words and as a rule."""

    method: str
    text: str
    strength: Callable[[Windows], NDArray[np.float64]]
    """how sure the rule is that the feature fires in each window [n]; 0: it is silent"""


class Explainer:
    """Makes the explanations of a store's features."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        documents = store.documents(limit=2**31).rows
        self._terms = {number: terms_of(f"{title} {key}") for number, key, title in documents}

    def explain(self, method: str, feature: int, fit: Windows) -> Explanation | None:
        """Explain a feature by one of METHODS; None where it has nothing to say."""
        if method == "logit":
            return self._logit(feature)
        if not fit.active.any():
            return None
        if method == "topic":
            return self._topic(fit)
        return explain_by_grams(self._store.vocabulary, fit, method)

    def _logit(self, feature: int) -> Explanation | None:
        """The tokens that the feature's decoder raises most: it should fire just before them.

        Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature
        Descriptions" (arXiv:2501.08319), call a description from these VocabProj.
        """
        top = self._store.logits(feature).top[:_EFFECTS]
        if not top:
            return None
        weights = {(each.token_id,): float(max(each.value, 1e-9)) for each in top}
        text = f"raises {_quoted(each.token for each in top)}"
        return Explanation("logit", text, lambda windows: gram_strength(windows, weights, begin=1))

    def _topic(self, fit: Windows) -> Explanation | None:
        """Words of the titles of the documents it fires in."""
        terms = [self._terms.get(int(number), frozenset()) for number in fit.document]
        active = fit.active
        counts = Counter(
            t for each, fires in zip(terms, active, strict=True) if fires for t in each
        )
        if not counts:
            return None
        candidates = sorted(counts, key=lambda term: (-counts[term], term))[:_CANDIDATES]
        present = np.array([[term in each for each in terms] for term in candidates])
        chosen = choose(present, active)
        weights = {candidates[i]: _share(present[i], active) for i in chosen}

        def strength(windows: Windows) -> NDArray[np.float64]:
            return np.array(
                [
                    max((weights.get(t, 0.0) for t in self._terms.get(int(n), ())), default=0.0)
                    for n in windows.document
                ]
            )

        return Explanation("topic", f"in documents titled {', '.join(weights)}", strength)


def terms_of(title: str) -> frozenset[str]:
    """The words of a title, in lower case, of three letters and more.

    >>> sorted(terms_of("The History of Jazz (music)"))
    ['history', 'jazz', 'music', 'the']
    """
    return frozenset(word for word in re.findall(r"\w+", title.lower()) if len(word) > 2)


def explain_by_grams(vocabulary: Vocabulary, fit: Windows, method: str) -> Explanation | None:
    """Tokens (method token), or runs of two and three tokens (ngram), that end where it fires.

    Runs of tokens as explanations: Foote et al. 2023, "Neuron to Graph" (arXiv:2305.19911), and
    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv:2406.04093), section 4.3.
    """
    candidates = _candidates(fit, (1,) if method == "token" else (2, 3))
    if not candidates:
        return None
    present = np.array([gram_places(fit.tokens, gram).any(axis=1) for gram in candidates])
    weights = {candidates[i]: _share(present[i], fit.active) for i in choose(present, fit.active)}
    texts = ("".join(vocabulary.decode(gram)) for gram in weights)
    text = f"{'on' if method == 'token' else 'at the end of'} {_quoted(texts)}"
    return Explanation(method, text, lambda windows: gram_strength(windows, weights))


def top_token(fit: Windows) -> Explanation | None:
    """The baseline: the token on which most windows have their strongest activation."""
    active = fit.active
    if not active.any():
        return None
    peak = fit.activation[active].argmax(axis=1)
    tokens = fit.tokens[active][np.arange(len(peak)), peak]
    ids, counts = np.unique(tokens, return_counts=True)
    weights = {(int(ids[counts.argmax()]),): 1.0}
    return Explanation("top_token", "", lambda windows: gram_strength(windows, weights))


def _candidates(fit: Windows, lengths: Sequence[int]) -> list[Gram]:
    """The runs of tokens that end where the feature fires, by their summed activation."""
    total: Counter[Gram] = Counter()
    for row, at in zip(*np.nonzero(fit.activation), strict=True):
        for length in lengths:
            if at >= length - 1:
                gram = tuple(fit.tokens[row, at - length + 1 : at + 1].tolist())
                total[gram] += float(fit.activation[row, at])  # type: ignore[assignment]
    ordered = sorted(total, key=lambda gram: (-total[gram], gram))
    return ordered[: _CANDIDATES * len(lengths)]


def gram_places(tokens: NDArray[np.int32], gram: Gram) -> NDArray[np.bool_]:
    """Where a run of tokens begins [n, size - length + 1]."""
    width = tokens.shape[1] - len(gram) + 1
    found = np.ones((len(tokens), max(width, 0)), dtype=bool)
    for offset, token in enumerate(gram):
        found &= tokens[:, offset : offset + width] == token
    return found


def gram_strength(
    windows: Windows, weights: Mapping[Gram, float], *, begin: int = 0
) -> NDArray[np.float64]:
    """Of each window [n] the largest weight of a run of tokens that is in it, from `begin` on."""
    strength = np.zeros(len(windows))
    for gram, weight in weights.items():
        there = gram_places(windows.tokens[:, begin:], gram).any(axis=1)
        strength[there] = np.maximum(strength[there], weight)
    return strength


def choose(present: NDArray[np.bool_], active: NDArray[np.bool_]) -> list[int]:
    """Candidates, of present [candidates, n], whose union tells active windows from silent best.

    Greedy: one after another is added, as long as the balanced accuracy grows by 0.01; at least
    one, at most five.
    """
    if active.all():  # nothing to tell apart: the commonest
        return [int(present.sum(axis=1).argmax())]
    chosen: list[int] = []
    union, best = np.zeros(present.shape[1], dtype=bool), 0.5
    while len(chosen) < _MOST:
        scores = [balanced_accuracy(active, union | each) for each in present]
        index = int(np.argmax(scores))
        if chosen and scores[index] < best + _LEAST_GAIN:
            break
        chosen.append(index)
        union, best = union | present[index], max(scores[index], best)
    return chosen


def _share(present: NDArray[np.bool_], active: NDArray[np.bool_]) -> float:
    """The share of active ones among windows with a candidate, if half of all were active."""
    on = present[active].mean()
    off = present[~active].mean() if not active.all() else 0.0
    return float((on + 1e-3) / (on + off + 2e-3))


def _quoted(texts: Iterable[str]) -> str:
    shown = (text.replace("\n", "↵").replace("\t", "→") for text in texts)
    return ", ".join(f"“{text}”" for text in shown)
