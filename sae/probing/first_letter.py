"""The first-letter task: which letter a word begins with, told by a model's activations at it.

Words are tokens of the model's vocabulary: a space and three or more letters of the alphabet, one
token in the text too. Of words that differ in capitals only the first is taken. Each stands at the
end of a prompt that answers the question for other words,

     tiger has the first letter: T
     lamp has the first letter: L
     river

and the activation is the one at its token. The template is that of Chanin et al. 2024 (arXiv
2409.14507); what would follow the word cannot change an activation at it, so it is not run.
"""

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from sae.probing import absorption as definitions
from sae.probing.absorption import absorption, main_latents
from sae.probing.divisions import TEST_SHARE, Indices
from sae.probing.family_file import FamilyFile
from sae.probing.logistic import STRENGTHS, Matrix, PreparedRows
from sae.probing.scores import best_cut, f1
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.paths import AnyPath
from saescope.progress import Progress

if TYPE_CHECKING:
    from activations import Model

VERSION = 2
"""of the definitions; other ones give other figures. In the first all letters' probes had one C"""
LETTERS = string.ascii_uppercase
LEAST_F1 = 0.6
"""of a letter's probe on test words, for the letter to count (Chanin et al. 2024)"""
LEAST_LETTERS = 20
"""letters that a score needs (SAEBench)"""
MAX_TOKENS = 1024
"""of a prompt; none comes near"""
_TEMPLATE = "\n{word} has the first letter: {letter}"
_WORD = re.compile(r" [A-Za-z]{3,}")
_FEWEST = 4
"""words that a letter needs: two to train on, two to test on"""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AbsorptionConfig(Config):
    """Which words and prompts absorption is measured on."""

    words: int = 150
    """The most words of a letter, drawn by chance where the vocabulary has more."""
    examples: int = 1
    """Answered words in front of each word; 0 for the word alone. Published: up to 10."""
    seed: int = 0
    """Draws words, examples and which words are for the test."""

    def __post_init__(self) -> None:
        check_range("absorption.words", self.words, low=_FEWEST)
        check_range("absorption.examples", self.examples, low=0, high=100)
        check_range("absorption.seed", self.seed, low=0)

    def quick(self) -> Self:
        """A look in a minute: each word by itself. With fewer words too few letters are told."""
        return replace(self, examples=0)


def protocol(config: AbsorptionConfig) -> dict[str, Any]:
    """What decides the results besides the activations and the SAE."""
    return {
        "version": VERSION,
        **asdict(config),
        "template": _TEMPLATE,
        "test_share": TEST_SHARE,
        "strengths": STRENGTHS,
        "cut": "of largest F1 on training words",
        "main_strength": definitions.STRENGTH,
        "least_f1": LEAST_F1,
        "least_letters": LEAST_LETTERS,
        "selection": "standardised mean difference on training words",
        "f1_jump": definitions.F1_JUMP,
        "most_main": definitions.MOST_MAIN,
        "fraction_cosine": definitions.FRACTION_COSINE,
        "full_cosine": definitions.FULL_COSINE,
        "proportion": definitions.PROPORTION,
        "most_absorbers": definitions.MOST_ABSORBERS,
    }


@dataclass(frozen=True, kw_only=True)
class LetterWords:
    """Words in their prompts, and which are for the test."""

    words: tuple[str, ...]
    """each with the space before it"""
    prompts: tuple[str, ...]
    """each ends with its word"""
    letter: NDArray[np.int64]
    """[words], index of the first letter in `LETTERS`"""
    test: NDArray[np.bool_]
    """[words], whether the word is for the test"""


def letter_words(model: "Model", config: AbsorptionConfig) -> LetterWords:
    """The words of a model's vocabulary, letters in order, in prompts of training words.

    Of each letter 30% of the words are for the test; a letter with fewer than four words is left
    out. No prompt has its own word among its examples. Raises InputError if no letter is left.
    """
    by_letter: dict[int, list[str]] = {index: [] for index in range(len(LETTERS))}
    for word in _vocabulary(model):
        by_letter[LETTERS.index(word[1].upper())].append(word)
    draw = np.random.default_rng(config.seed)
    words, letter, test = [], [], []
    for index, own in by_letter.items():
        if len(own) < _FEWEST:
            continue
        order = draw.permutation(len(own))[: config.words]
        for_test = max(2, round(TEST_SHARE * len(order)))
        words += [own[each] for each in order]
        letter += [index] * len(order)
        test += [place < for_test for place in range(len(order))]
    if not words:
        raise InputError(
            "the vocabulary has no letter with four words that are one token with a space before",
            where="absorption",
        )
    is_test = np.array(test)
    train = np.flatnonzero(~is_test)
    prompts = tuple(
        _prompt(each, [words[other] for other in draw.permutation(train)], config.examples)
        for each in words
    )
    return LetterWords(words=tuple(words), prompts=prompts, letter=np.array(letter), test=is_test)


def _vocabulary(model: "Model") -> Iterator[str]:
    """Words that are one token, each spelling once, by the token's id."""
    tokens = {
        word: token
        for token, word in enumerate(model.vocabulary())
        if isinstance(word, str) and _WORD.fullmatch(word) and word.isascii()
    }
    found = model.tokenize_batch([f"\n{word}" for word in tokens])
    seen: set[str] = set()
    for (word, token), ids in zip(tokens.items(), found, strict=True):
        if ids[-1:] == [token] and word.lower() not in seen:
            seen.add(word.lower())
            yield word


def _prompt(word: str, others: Sequence[str], examples: int) -> str:
    """A word after so many answered ones.

    >>> _prompt(" river", [" river", " lamp", " tiger"], 1)
    '\\n lamp has the first letter: L\\n river'
    """
    chosen = [each for each in others[: examples + 1] if each != word][:examples]
    answered = (_TEMPLATE.format(word=each, letter=each[1].upper()) for each in chosen)
    return "".join((*answered, f"\n{word}"))


@dataclass(frozen=True, kw_only=True)
class LetterProbe:
    """A probe of activations for one letter."""

    letter: str
    y: NDArray[np.bool_]
    """[words], whether the word begins with it"""
    direction: Matrix
    """[d_in], along which activations tell it; of any length"""
    f1: float
    """on test words"""
    hits: Indices
    """test words that begin with the letter, and that the probe says do"""


def letter_probes(x: Matrix, words: LetterWords, *, seed: int) -> list[LetterProbe]:
    """A probe a letter, fitted on the activations x [words, d_in] of training words.

    Each has the C that cross-validation chooses for its letter (rare letters want a larger one),
    and the cut of largest F1 on training words: one word in 26 has the letter, so log-odds of 0
    call next to none. No probes if there is one letter alone.
    """
    train, test = np.flatnonzero(~words.test), np.flatnonzero(words.test)
    found = []
    letters = np.unique(words.letter)
    if len(letters) < 2:
        return []
    rows = PreparedRows(x[train])
    with Progress("letter probes", len(letters), "letters") as progress:
        for index in letters:
            y = words.letter == index
            probe = rows.fit(y[train], seed=seed)
            scores = probe.score(x[test]) - best_cut(probe.score(x[train]), y[train])
            found.append(
                LetterProbe(
                    letter=LETTERS[index],
                    y=y,
                    direction=probe.weight / probe.scale,
                    f1=f1(scores, y[test]),
                    hits=test[y[test] & (scores > 0)],
                )
            )
            progress.advance(note=LETTERS[index])
    return found


def letter_rows(
    x: Matrix,
    codes: sparse.csr_array,
    decoder: Matrix,
    words: LetterWords,
    probes: Sequence[LetterProbe],
    *,
    method: str,
    seed: int,
) -> list[Row]:
    """What became of each letter in an SAE, one row a letter whose probe is good enough.

    Args: x [words, d_in] with codes [words, d_sae], decoder [d_sae, d_in].
    """
    train = np.flatnonzero(~words.test)
    rows = []
    good = [each for each in probes if each.f1 > LEAST_F1]  # such a one has hits
    with Progress(f"absorption, {method}", len(good), "letters") as progress:
        for probe in good:
            main = main_latents(codes[train], probe.y[train], seed=seed)
            found = absorption(
                x[probe.hits], codes[probe.hits], decoder, probe.direction, main.latents
            )
            rows.append(
                {
                    "method": method,
                    "letter": probe.letter,
                    "probe_f1": probe.f1,
                    "words": len(probe.hits),
                    "main": main.latents.tolist(),
                    "main_f1": main.f1,
                    "fraction": float(found.fraction.mean()),
                    "full": float(found.full.mean()),
                    "fully_absorbed": [words.words[each] for each in probe.hits[found.full]],
                }
            )
            progress.advance(note=probe.letter)
    return rows


LETTERS_FILE = FamilyFile("absorption", "a table of absorption by letter", "by_letter")


def write_letters(evaluation: AnyPath, rows: Sequence[Row], protocol_hash: str) -> None:
    """Write the rows of letters beside an evaluation's file; see `FamilyFile.write`."""
    LETTERS_FILE.write(evaluation, protocol_hash, {"by_letter": list(rows)})
