"""Absorption and splitting of first letters: latents that stand in for a silent one.

Definitions are in `sae.probing.absorption`, words and prompts in `sae.probing.first_letter`; the
protocol is docs/reference/evaluation.md.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sae.evaluation import OwnTexts, metric_family
from sae.evaluation.on_texts import OnTexts
from sae.evaluation.paired import unit_by_unit
from sae.probing import text_rows
from sae.probing.first_letter import (
    LEAST_LETTERS,
    LETTERS,
    MAX_TOKENS,
    AbsorptionConfig,
    LetterWords,
    Row,
    letter_probes,
    letter_rows,
    letter_words,
    protocol,
    write_letters,
)
from sae.probing.representations import activations_of, features_of, untrained
from sae.probing.scores import mean_and_interval
from sae.probing.text_rows import RowCache, TextRows
from saescope.metrics import Metric
from saescope.progress import Progress, say

_UNTRAINED_SEED = 0
_FEW = f"fewer than {LEAST_LETTERS} letters can be told from the activations"
_CHANIN = "Chanin et al. 2024 (arXiv 2409.14507)"

METRICS = (
    Metric(
        name="absorption_fraction",
        label="absorption fraction",
        better="lower",
        help="Of what there is of a word's first letter, the part that other latents than the "
        "letter's own write, where these are three at most and write 40% or more; mean over "
        "letters. Read the letters' F1 beside it.",
        source="SAEBench (Karvonen et al. 2025)",
        interval=True,
        undefined=_FEW,
    ),
    Metric(
        name="full_absorption",
        label="full absorption",
        form=".1%",
        better="lower",
        help="Share of words on which all latents of the first letter are silent and one other "
        "writes 40% or more of it; mean over letters.",
        source=_CHANIN,
        interval=True,
        undefined=_FEW,
    ),
    Metric(
        name="letter_latents",
        label="latents a letter",
        form=".2f",
        better="lower",
        help="How many latents a first letter is split into: as many as raise F1 by more than "
        "0.03 each; mean over letters.",
        source=_CHANIN,
        interval=True,
        undefined=_FEW,
    ),
    Metric(
        name="letter_f1",
        label="letters' F1",
        better="higher",
        help="How well these latents tell the letter of training words left out; mean over "
        "letters. Where it is low there is no letter's latent that could be absorbed.",
        interval=True,
        undefined=_FEW,
    ),
    Metric(
        name="absorption_fraction_untrained",
        label="absorption, untrained",
        better="neither",
        help="Absorption fraction of an SAE of the same shape that was never trained.",
        interval=True,
        undefined=_FEW,
    ),
    Metric(
        name="letter_f1_untrained",
        label="letters' F1, untrained",
        better="neither",
        help="Letters' F1 of an SAE of the same shape that was never trained.",
        interval=True,
        undefined=_FEW,
    ),
)


def facts(config: AbsorptionConfig, model: Mapping[str, Any], site: str) -> dict[str, Any]:
    """Settings, definitions, and what decides the activations at words."""
    return {**protocol(config), "rows": text_rows.protocol(model, site, "last", MAX_TOKENS)}


@metric_family(
    "absorption",
    needs="texts",
    metrics=METRICS,
    suite="absorption",
    texts=OwnTexts(
        settings=AbsorptionConfig,
        facts=facts,
        counted=("words", "held-out words"),
        unit="letters",
        write=write_letters,
        controls={
            "absorption_fraction": {"untrained": "absorption_fraction_untrained"},
            "letter_f1": {"untrained": "letter_f1_untrained"},
        },
    ),
)
def absorption(given: OnTexts[AbsorptionConfig]) -> dict[str, Any]:
    """Measure all letters; a row a letter goes into `given.tables`.

    Raises InputError for a transcoder, whose latents write elsewhere than the probes read, and if
    the vocabulary has no words.
    """
    config = given.settings
    sae = given.reconstructing("absorption")
    words = letter_words(given.model, config)
    rows = _rows(given.row_cache("last", MAX_TOKENS), words)
    seen = TextRows(x=given.seen(rows.x.float()), text=rows.text)
    x = activations_of(seen, len(words.words))
    probes = letter_probes(x, words, seed=config.seed)

    fresh = untrained(sae, given.some_rows(), _UNTRAINED_SEED)
    found: list[Row] = []
    for method, each in (("sae", sae), ("untrained", fresh)):
        codes = features_of(each.encode_sparse, seen, len(words.words))
        decoder = each.decoder_directions().detach().double().cpu().numpy()
        found += letter_rows(x, codes, decoder, words, probes, method=method, seed=config.seed)
    given.tables["absorption"] = found
    values = summary(found)
    if values["absorption_fraction"] is None:
        say(f"absorption: {_FEW} ({values['letters']}), so there is no score")
    return {**values, "words": int(np.sum(words.test))}


def _rows(cache: RowCache, words: LetterWords) -> TextRows:
    """The activation of every word; letter by letter, so that after a kill the others follow."""
    letters = np.unique(words.letter)
    found = []
    with Progress("words", len(words.words), "words") as progress:
        for index in letters:
            own = np.flatnonzero(words.letter == index)
            rows = cache.rows(
                f"first-letter-{LETTERS[index]}", [words.prompts[each] for each in own]
            )
            found.append(TextRows(x=rows.x, text=own[rows.text]))
            progress.advance(len(own), LETTERS[index])
    x = torch.cat([each.x for each in found])
    return TextRows(x=x, text=np.concatenate([each.text for each in found]))


def summary(rows: list[Row]) -> dict[str, Any]:
    """The metrics: means over letters, with intervals of Student's t, letters as the unit."""
    own = [row for row in rows if row["method"] == "sae"]
    control = [row for row in rows if row["method"] == "untrained"]
    values = {
        "absorption_fraction": [row["fraction"] for row in own],
        "full_absorption": [row["full"] for row in own],
        "letter_latents": [float(len(row["main"])) for row in own],
        "letter_f1": [row["main_f1"] for row in own],
        "absorption_fraction_untrained": [row["fraction"] for row in control],
        "letter_f1_untrained": [row["main_f1"] for row in control],
    }
    found: dict[str, Any] = {"letters": len(own)}
    if len(own) < LEAST_LETTERS:
        return found | dict.fromkeys(values)
    for name, each in values.items():
        found[name], found[f"{name}_interval"] = mean_and_interval(each)
    for name, value in (("absorption_fraction", "fraction"), ("letter_f1", "main_f1")):
        sae, untrained = ({row["letter"]: row[value] for row in each} for each in (own, control))
        found |= unit_by_unit(f"{name}_untrained", sae, untrained)
    return found
