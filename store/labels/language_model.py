"""Labels by a language model: one prompt explains, others score the explanation.

- explainer: windows with the tokens marked on which the feature fires, as in Bills et al. 2023
  ("Language models can explain neurons in language models"), in the form of delphi: <<token>> above
  0.3 of the feature's maximum, with activations from 0 to 10.
- detection (Paulo et al. 2024, arXiv:2410.13928): which of five windows, with nothing marked, does
  the explanation fit? Windows where the feature fires against windows where it is silent.
- fuzzing (the same paper): are the marked tokens those that the explanation is about? Active
  windows have the right tokens marked, silent ones as many random tokens as an active window has
  on average (delphi's default).
"""

import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.labels.endpoint import Client, Messages, estimated_tokens
from store.labels.scores import Detection, detection
from store.labels.windows import NO_TOKEN, Windows
from store.vocabulary import Vocabulary

MARKED = 0.3
"""share of the feature's maximum from which on a token is marked"""
SHOWN_TOGETHER = 5
EXPLANATION_TOKENS, VERDICT_TOKENS = 300, 30
_EXPLAIN = (
    "You study a feature of a language model. Each text below contains tokens between << and >> on "
    "which the feature is active; after the text, each of these tokens stands with its activation "
    "from 0 to 10. Say in one short phrase what the marked tokens, or the texts around them, have "
    "in common. Do not mention the marks or list the texts. The last line of your answer must be\n"
    "EXPLANATION: the phrase"
)
_DETECT = (
    "A feature of a language model is active in texts that fit a description. For each numbered "
    "text, decide if it fits. Answer with nothing but a JSON list with one entry for each text, in "
    "order: 1 if it fits, 0 if it does not."
)
_FUZZ = (
    "A feature of a language model is active on tokens that fit a description. In each numbered "
    "text some tokens stand between << and >>. Decide if these are the tokens that the description "
    "is about. Answer with nothing but a JSON list with one entry for each text, in order: 1 if "
    "they are, 0 if they are not."
)
_LIST = re.compile(r"\[[\s01,]*\]")


@dataclass(frozen=True)
class Judged:
    """A score, and how many answers could not be read."""

    score: Detection | None
    unreadable: int


def window_texts(
    vocabulary: Vocabulary, windows: Windows, marked: NDArray[np.bool_] | None = None
) -> list[str]:
    """The windows as text; runs of marked tokens, of marked [n, size], between << and >>."""
    found = []
    for row, ids in enumerate(windows.tokens):
        texts = vocabulary.decode([int(token) for token in ids if token != NO_TOKEN])
        on = np.zeros(len(texts), bool) if marked is None else marked[row, : len(texts)]
        pieces = []
        for index, text in enumerate(texts):
            begins = on[index] and (index == 0 or not on[index - 1])
            ends = on[index] and (index == len(texts) - 1 or not on[index + 1])
            pieces.append(f"{'<<' if begins else ''}{text}{'>>' if ends else ''}")
        found.append("".join(pieces))
    return found


def right_marks(windows: Windows, maximum: float) -> NDArray[np.bool_]:
    """The tokens to mark [n, size]: those above MARKED of the maximum, or the strongest."""
    activation = windows.activation
    strongest = activation.max(axis=1, keepdims=True)
    threshold = np.minimum(MARKED * maximum, strongest)
    return (activation > 0) & (activation >= threshold)


def fuzzed_marks(windows: Windows, maximum: float, random: np.random.Generator) -> NDArray:
    """Right marks in active windows, and as many random ones as they have on average in silent."""
    marks, active = right_marks(windows, maximum), windows.active
    count = math.ceil(marks[active].sum(axis=1).mean()) if active.any() else 1
    for row in np.flatnonzero(~active):
        there = np.flatnonzero(windows.tokens[row] != NO_TOKEN)
        marks[row, random.choice(there, min(count, len(there)), replace=False)] = True
    return marks


def explain_messages(vocabulary: Vocabulary, fit: Windows, maximum: float, shown: int) -> Messages:
    """The prompt for an explanation, with up to `shown` active windows, from strong to weak."""
    active = np.flatnonzero(fit.active)
    order = np.argsort(-fit.activation[active].max(axis=1), kind="stable")
    spread = np.linspace(0, len(active) - 1, min(shown, len(active))).round().astype(int)
    rows = active[order[spread]]
    windows = Windows(fit.tokens[rows], fit.activation[rows], fit.document[rows])
    marks = right_marks(windows, maximum)
    lines = []
    for row, text in enumerate(window_texts(vocabulary, windows, marks)):
        said = [
            f"{vocabulary.text(int(windows.tokens[row, at]))!r}: "
            f"{math.ceil(10 * windows.activation[row, at] / maximum)}"
            for at in np.flatnonzero(marks[row])
        ]
        lines.append(f"Text {row + 1}: {text}\nActivations: {', '.join(said)}")
    return [_message("system", _EXPLAIN), _message("user", "\n\n".join(lines))]


def read_explanation(answer: str) -> str:
    """The phrase after the last EXPLANATION:, or the last line of an answer without one.

    >>> read_explanation("They are waters. EXPLANATION: names of **rivers**.")
    'names of **rivers**.'
    """
    lines = [line.strip() for line in answer.rsplit("EXPLANATION:", 1)[-1].splitlines()]
    said = [line for line in lines if line]
    return said[0 if "EXPLANATION:" in answer else -1] if said else ""


def judge_messages(explanation: str, texts: Sequence[str], *, fuzzing: bool) -> Messages:
    """The prompt for verdicts on up to SHOWN_TOGETHER texts."""
    numbered = "\n\n".join(f"Text {number}: {text}" for number, text in enumerate(texts, 1))
    asked = f"Description: {explanation}\n\n{numbered}"
    return [_message("system", _FUZZ if fuzzing else _DETECT), _message("user", asked)]


def read_verdicts(answer: str, count: int) -> list[bool] | None:
    """The verdicts of an answer; None if it has not one for each text.

    >>> read_verdicts("Sure: [1, 0]", 2), read_verdicts("[1]", 2)
    ([True, False], None)
    """
    found = _LIST.search(answer)
    try:
        values = json.loads(found[0]) if found else []
    except ValueError:
        return None
    return [value == 1 for value in values] if len(values) == count else None


def judge(
    client: Client,
    explanation: str,
    windows: Windows,
    texts: Sequence[str],
    *,
    fuzzing: bool,
    random: np.random.Generator,
    concurrency: int,
) -> Judged:
    """Score an explanation: the windows are shuffled, and shown five at a time.

    Windows whose verdicts cannot be read are left out of the score, and counted.
    """
    order = random.permutation(len(texts))
    batches = [order[i : i + SHOWN_TOGETHER] for i in range(0, len(order), SHOWN_TOGETHER)]

    def verdicts(batch: NDArray[np.int64]) -> list[bool] | None:
        shown = [texts[int(index)] for index in batch]
        messages = judge_messages(explanation, shown, fuzzing=fuzzing)
        return read_verdicts(client.ask(messages, max_tokens=VERDICT_TOKENS), len(batch))

    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(verdicts, batches))
    read = [(b, a) for b, a in zip(batches, answers, strict=True) if a is not None]
    if not read:
        return Judged(None, len(order))
    rows = np.concatenate([batch for batch, _ in read])
    said = np.array([value for _, answer in read for value in answer], dtype=np.float64)
    return Judged(detection(windows.active[rows], said), len(order) - len(rows))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def tokens_of(messages: Messages) -> int:
    """About how many tokens a prompt has."""
    return sum(estimated_tokens(message["content"]) for message in messages)
