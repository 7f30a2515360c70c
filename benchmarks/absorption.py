r"""Absorption of first letters by SAEBench and by us: the same words, probes, SAE, main latents.

    python -m benchmarks.absorption --sae runs/smollm2-135m-topk-quick

SAEBench runs in an environment of its own, with the SAE exported to SAELens' format; its encoder,
cosines, absorption fraction and full absorption are the library's, as is the arithmetic in float32.
Words, the activations at them, the probes' directions and the main latents are ours. A row a
letter: means over its test words on both sides, and the largest difference on one of its words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations import load_model
from activations.models.files import folder_of
from benchmarks.peers.environments import ABSORPTION
from benchmarks.running import run, run_peer
from sae.bench import rows as results
from sae.commands.convert import ConvertConfig, convert
from sae.core.base import SparseAutoencoder
from sae.data.placement import placement_of
from sae.formats.load import load
from sae.probing.absorption import Absorption, absorption, main_latents
from sae.probing.first_letter import (
    LEAST_F1,
    MAX_TOKENS,
    AbsorptionConfig,
    LetterWords,
    letter_probes,
    letter_words,
)
from sae.probing.logistic import Matrix
from sae.probing.representations import activations_of, features_of
from sae.probing.text_rows import TextModel, TextRows
from saescope.config import Config
from saescope.errors import check_range
from saescope.paths import remove
from saescope.progress import say

COLUMNS = (
    "date", "library", "version", "letter", "words", "main", "fraction_library", "fraction",
    "fraction_largest", "full_library", "full", "full_differs", "processor", "threads", "saescope",
    "commit",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AbsorptionBenchmarkConfig(Config):
    """Measure absorption with SAEBench and with saescope, and compare letter by letter."""

    sae: str
    """Folder of the run or SAE, of one site of a language model."""
    model: str = "smollm2-135m"
    """The model that it was trained on."""
    words: int = 150
    """The most words of a letter."""
    examples: int = 0
    """Answered words in front of each word."""
    threads: int = 1
    """Threads of torch, in the library."""
    work: str = "build/peers"
    """Folder for the environment and for what is written."""
    results: str = "benchmarks/results/absorption.csv"
    """File that rows are added to."""

    def __post_init__(self) -> None:
        check_range("threads", self.threads, low=1)


@dataclass(frozen=True, kw_only=True)
class Letter:
    """What both sides are given of a letter, and what ours makes of it."""

    words: Sequence[str]
    x: NDArray[np.float32]
    """[words, d_in]"""
    direction: NDArray[np.float32]
    """[d_in], the probe's"""
    main: Sequence[int]
    ours: Absorption


def letters_of(
    rows: TextRows, words: LetterWords, sae: SparseAutoencoder, seed: int
) -> dict[str, Letter]:
    """The letters that probes tell."""
    x = activations_of(rows, len(words.words))
    codes = features_of(sae.encode_sparse, rows, len(words.words))
    decoder: Matrix = sae.decoder_directions().detach().double().numpy()
    train = np.flatnonzero(~words.test)
    found = {}
    for probe in letter_probes(x, words, seed=seed):
        if probe.f1 <= LEAST_F1:
            continue
        main = main_latents(codes[train], probe.y[train], seed=seed).latents
        hits, direction = probe.hits, probe.direction.astype(np.float32)
        # both sides see the same float32 direction
        ours = absorption(x[hits], codes[hits], decoder, direction.astype(np.float64), main)
        found[probe.letter] = Letter(
            words=[words.words[each] for each in hits],
            x=x[hits].astype(np.float32),
            direction=direction,
            main=main.tolist(),
            ours=ours,
        )
    return found


def rows_of(
    letters: Mapping[str, Letter], theirs: Mapping[str, Any], common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the results, a row a letter; each is printed."""
    found = []
    for name, letter in letters.items():
        fraction, full = np.array(theirs[name], np.float64).T
        ours = letter.ours
        row = {
            **common,
            "letter": name,
            "words": len(letter.words),
            "main": len(letter.main),
            "fraction_library": f"{fraction.mean():.8f}",
            "fraction": f"{ours.fraction.mean():.8f}",
            "fraction_largest": f"{np.abs(fraction - ours.fraction).max():.1e}",
            "full_library": f"{full.mean():.8f}",
            "full": f"{ours.full.mean():.8f}",
            "full_differs": int((ours.full != full.astype(bool)).sum()),
        }
        found.append(row)
        say(
            f"{name}: absorption fraction {row['fraction']} (SAEBench {row['fraction_library']}), "
            f"full {row['full']} ({row['full_library']}), {row['words']} words"
        )
    return found


def main(config: AbsorptionBenchmarkConfig) -> None:
    """Run both; rows in the results, and the largest difference of a word."""
    folder = Path(config.work).absolute() / "absorption"
    remove(folder)
    folder.mkdir(parents=True)
    convert(ConvertConfig(source=config.sae, out=str(folder / "sae"), to="saelens"))
    placement = placement_of(load(config.sae))
    model = load_model(str(folder_of(config.model, None)[0]), dtype="float32")
    chosen = AbsorptionConfig(words=config.words, examples=config.examples)
    words = letter_words(model, chosen)
    shown = TextModel(
        model=model, site=placement.read[0], representation="last", max_tokens=MAX_TOKENS
    )
    letters = letters_of(shown.rows(words.prompts), words, placement.sae, chosen.seed)
    arrays = {f"x_{name}": each.x for name, each in letters.items()}
    arrays |= {f"direction_{name}": each.direction for name, each in letters.items()}
    np.savez(folder / "letters.npz", allow_pickle=False, **arrays)
    settings = {
        "sae": str(folder / "sae"),
        "folder": str(folder),
        "threads": config.threads,
        "letters": {
            name: {"words": list(each.words), "main": list(each.main)}
            for name, each in letters.items()
        },
    }
    found = run_peer(ABSORPTION, ABSORPTION.script, settings, Path(config.work), folder)
    facts = results.facts("cpu")
    common = {
        "library": ABSORPTION.name,
        "version": found["version"],
        **{name: facts[name] for name in ("date", "processor", "threads", "saescope", "commit")},
    }
    written = rows_of(letters, found["letters"], common)
    results.append(Path(config.results), written, COLUMNS)
    largest = max(float(row["fraction_largest"]) for row in written)
    differs = sum(row["full_differs"] for row in written)
    say(
        f"{len(letters)} letters: largest difference of a word's absorption fraction "
        f"{largest:.1e}, {differs} words differ in full absorption"
    )
    remove(folder)


if __name__ == "__main__":
    run(AbsorptionBenchmarkConfig, main)
