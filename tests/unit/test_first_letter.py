"""Absorption of first letters: words and prompts, and a model whose letters are planted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import sae
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.architectures.transcoder import Transcoder, TranscoderConfig
from sae.commands import evaluate_runs as several
from sae.evaluation.absorption import absorption, summary
from sae.evaluation.on_texts import OnTexts
from sae.evaluation.written import read_evaluation
from sae.probing.config import ProbingConfig
from sae.probing.first_letter import (
    LETTERS,
    AbsorptionConfig,
    LetterWords,
    letter_probes,
    letter_words,
)
from sae.probing.logistic import fit
from saescope.__main__ import main
from saescope.errors import InputError
from tests.artefacts import train_config
from tests.tiny import make_tiny_harvest, make_tiny_model

ENDINGS = ("ab", "eb", "ib", "ob", "ub", "ac", "ec", "ic", "oc", "uc")
WORDS = [f" {letter.lower()}{ending}" for letter in LETTERS for ending in ENDINGS]
OWN = 36
"""coordinates that words have of their own; the letters have one each"""
D = len(LETTERS) + OWN


def own_directions() -> torch.Tensor:
    """What a word's activation has beside its letter's: unit rows [words, D]."""
    drawn = torch.randn(len(WORDS), OWN, generator=torch.Generator().manual_seed(3))
    return functional.pad(functional.normalize(drawn, dim=1), (len(LETTERS), 0))


class Planted:
    """A model of words: its activation at one is its letter's direction and its own."""

    bos_token_id = None

    def vocabulary(self) -> list[str | bytes]:
        odd: list[str | bytes] = [
            "\n",
            " has the",
            "river",
            b"\xff",
            " no",
            " it's",
            " 12345",
        ]
        return [*odd, *WORDS, " DAB"]

    def tokenize_batch(self, texts: Any) -> list[list[int]]:
        known = self.vocabulary()
        return [[0, known.index(text[text.rindex(" ") :])] for text in texts]

    def facts(self) -> dict[str, Any]:
        return {"weights_hash": "w", "tokenizer_hash": "t", "dtype": "float32"}

    def keep_mask(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(tokens.shape[1]).expand(tokens.shape) > 0

    def capture(self, tokens: torch.Tensor, sites: list[str]) -> dict[str, torch.Tensor]:
        word = (tokens - self.vocabulary().index(WORDS[0])).clamp_min(0)
        letter = word // len(ENDINGS)
        found = own_directions()[word]
        found.scatter_(-1, letter[..., None], 2.0)
        return {sites[0]: found}


def absorbed_words() -> list[str]:
    """A test word of each of five letters."""
    words = letter_words(Planted(), AbsorptionConfig(examples=1))  # type: ignore[arg-type]
    test = [word for word, test in zip(words.words, words.test, strict=True) if test]
    return [next(word for word in test if word[1] == letter) for letter in "dkptw"]


def planted_sae() -> Any:
    """A latent a letter, and one for each of `absorbed_words`, which writes the letter too.

    On these words the letter's latent, which sees them coming, stays silent.
    """
    absorbed = absorbed_words()
    found = TopKSAE(TopKConfig(d_sae=len(LETTERS) + len(absorbed), k=1), D)
    own = own_directions()
    encoder, decoder = torch.eye(found.d_sae, D), torch.eye(found.d_sae, D)
    for latent, word in enumerate(absorbed, start=len(LETTERS)):
        letter, direction = LETTERS.index(word[1].upper()), own[WORDS.index(word)]
        encoder[latent] = decoder[latent] = direction
        decoder[latent, letter] = 2.0
        encoder[letter] -= 3 * direction
    with torch.no_grad():
        found.W_enc_T.copy_(encoder)
        found.W_dec.copy_(decoder)
        found.b_enc.zero_()
        found.b_dec.zero_()
    return found.eval()


def given(folder: Path, **changes: Any) -> OnTexts[AbsorptionConfig]:
    values: dict[str, Any] = {
        "model": Planted(),
        "site": "site",
        "sae": planted_sae(),
        "sae_hash": "h",
        "seen": lambda x: x,
        "some_rows": lambda: torch.rand(64, D, generator=torch.Generator().manual_seed(0)),
        "settings": AbsorptionConfig(examples=1),
        "cache": folder,
        "cache_limit": 1 << 30,
    }
    return OnTexts(**(values | changes))


def test_words_are_tokens_each_spelling_once_and_divided_by_letter() -> None:
    config = AbsorptionConfig(words=8, examples=2)
    words = letter_words(Planted(), config)  # type: ignore[arg-type]
    assert len(words.words) == 26 * 8
    assert set(words.words) <= set(WORDS)  # " DAB" is " dab" again
    for letter in range(26):
        of_letter = words.letter == letter
        assert of_letter.sum() == 8
        assert (of_letter & words.test).sum() == 2  # 30% of 8
    tests = {word for word, test in zip(words.words, words.test, strict=True) if test}
    for word, prompt in zip(words.words, words.prompts, strict=True):
        *answered, last = prompt.split("\n")[1:]
        assert last == word
        assert len(answered) == 2
        for line in answered:
            shown, answer = line.split(" has the first letter: ")
            assert answer == shown[1].upper()
            assert shown not in tests | {word}  # test words are seen in the test alone
    again = letter_words(Planted(), config)  # type: ignore[arg-type]
    assert again.prompts == words.prompts


def test_each_letter_has_a_strength_of_its_own() -> None:
    """One that is clear wants a large C, one in noise a small one."""
    draw = np.random.default_rng(0)
    letter = np.arange(240) % 3
    x = draw.normal(size=(240, 5))
    x[:, 0] += 6.0 * (letter == 0)
    x[:, 1] += 0.3 * (letter == 1)
    words = tuple(f" {LETTERS[each].lower()}{number}" for number, each in enumerate(letter))
    test = np.arange(240) % 4 == 0
    given = LetterWords(words=words, prompts=words, letter=letter, test=test)
    probes = letter_probes(x, given, seed=0)
    alone = [fit(x[~test], letter[~test] == each, seed=0) for each in range(3)]
    assert len({each.strength for each in alone}) > 1
    for found, expected in zip(probes, alone, strict=True):
        np.testing.assert_array_equal(found.direction, expected.weight / expected.scale)


def test_a_quick_look_has_as_many_words_so_that_letters_are_told() -> None:
    quick = AbsorptionConfig(words=80, examples=3).quick()
    assert (quick.words, quick.examples) == (80, 0)


def test_planted_absorption_is_found_and_nothing_else(tmp_path: Path) -> None:
    on = given(tmp_path)
    found = absorption(on)
    rows = {row["letter"]: row for row in on.tables["absorption"] if row["method"] == "sae"}
    assert found["letters"] == len(rows) == 26
    for letter, row in rows.items():
        own = [word for word in absorbed_words() if word[1].upper() == letter]
        assert row["main"][0] == LETTERS.index(letter)
        assert row["fully_absorbed"] == own
        assert row["full"] == row["fraction"] == len(own) / row["words"]
    assert found["full_absorption"] == pytest.approx(np.mean([r["full"] for r in rows.values()]))
    assert found["letter_latents"] == 1.0
    assert found["letter_f1"] > 0.98
    assert found["letter_f1_untrained"] < 0.8


def test_two_runs_agree_and_the_second_reads_its_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = absorption(given(tmp_path))
    monkeypatch.delattr(Planted, "capture")
    assert absorption(given(tmp_path)) == first


def test_no_score_of_few_letters_and_means_by_hand() -> None:
    def row(method: str, number: int) -> dict[str, Any]:
        return {
            "method": method,
            "letter": "abcdefghijklmnopqrst"[number],
            "main": [1, 2] if number % 2 else [1],
            "main_f1": 0.5,
            "fraction": number / 100,
            "full": 0.25,
        }

    rows = [row(method, number) for method in ("sae", "untrained") for number in range(20)]
    found = summary(rows)
    assert found["absorption_fraction"] == pytest.approx(0.095)
    # t(0.975, 19) = 2.0930; the variance of 0, 1, ..., 19 is 35
    assert found["absorption_fraction_interval"] == pytest.approx(
        2.0930241 * np.sqrt(35 / 20) / 100
    )
    assert found["letter_latents"] == 1.5
    assert found["full_absorption_interval"] == 0.0
    few = summary(rows[1:])
    assert few["letters"] == 19
    assert few["absorption_fraction"] is few["letter_f1_untrained"] is None
    assert "absorption_fraction_interval" not in few


def test_wrong_input_is_named(tmp_path: Path) -> None:
    class NoWords(Planted):
        def vocabulary(self) -> list[str | bytes]:
            return ["a", "b"]

    with pytest.raises(InputError, match="no letter with four words"):
        absorption(given(tmp_path, model=NoWords()))
    with pytest.raises(InputError, match=r"absorption\.words.*4"):
        AbsorptionConfig(words=3)
    transcoder = Transcoder(TranscoderConfig(d_sae=D, k=2), D, D)
    with pytest.raises(InputError, match="transcoder"):
        absorption(given(tmp_path, sae=transcoder))


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/a on a tiny harvest, whose vocabulary has words of few letters."""
    root = tmp_path_factory.mktemp("absorption")
    harvest = make_tiny_harvest(root, make_tiny_model(root / "model"), documents=30)
    sae.train(train_config(harvest, root / "runs" / "a"))
    return root


def test_the_command_writes_letters_and_says_why_there_is_no_score(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.json"
    words = [
        *("eval", str(root / "runs" / "a"), "--suite", "absorption", "--out", str(out)),
        *("--absorption.examples", "0", "--probing.cache", str(tmp_path / "texts")),
    ]
    assert main(words) == 0
    evaluation = read_evaluation(out)
    assert evaluation["absorption"]["absorption_fraction"] is None
    assert evaluation["protocol"]["absorption"]["examples"] == 0
    assert "probing" not in evaluation["protocol"]
    written = json.loads((tmp_path / "e.absorption.json").read_text())
    assert written["protocol_hash"] == evaluation["protocol_hash"]
    shown = capsys.readouterr().out
    assert "undefined: fewer than 20 letters" in shown


def test_a_run_measured_already_is_left_until_the_words_change(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for number in (5, 5, 6):
        several.evaluate_runs(
            several.EvaluateRunsConfig(
                run=str(root / "runs" / "a"),
                runs=(str(root / "runs" / "b"),),
                suite=("absorption",),
                absorption=AbsorptionConfig(words=number, examples=0),
                probing=ProbingConfig(cache=str(tmp_path / "texts")),
                replace=True,
            )
        )
        told.append(capsys.readouterr().out)
    assert ["measured already" in each for each in told] == [False, True, False]
