"""SAEBench's own absorption of first letters; runs in that library's environment.

    python in_saebench.py SETTINGS.json

The SAE is in SAELens' format. Its encoder, cosines, absorption fraction and full absorption are the
library's (`FeatureAbsorptionCalculator`); which words, the activations at them, the probes and the
main latents are given, so that both sides judge the same.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
from sae_lens import SAE

LAYER = 0
"""of the hook that the library asks for; there are activations of one site alone"""


class Given:
    """Stands in for the model: activations at words that are given."""

    def __init__(self, words: list[str], x: np.ndarray) -> None:
        self.of = {f"{word}:": torch.from_numpy(row) for word, row in zip(words, x, strict=True)}

    def to_tokens(self, prompt: str) -> list[list[str]]:
        return [[prompt]]

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict]:
        rows = torch.stack([self.of[prompt.lstrip("\n")] for prompt in prompts])[:, None]
        return None, {names_filter[0]: rows}


def main(settings: dict) -> None:
    """The library's fraction and full absorption of every word, in the file asked for."""
    torch.set_num_threads(settings["threads"])
    folder = Path(settings["folder"])
    sae = SAE.load_from_disk(settings["sae"], device="cpu")
    found = {}
    with np.load(folder / "letters.npz") as arrays:
        for letter, given in settings["letters"].items():
            calculator = FeatureAbsorptionCalculator(
                model=Given(given["words"], arrays[f"x_{letter}"]),
                icl_word_list=[],
                max_icl_examples=0,
                word_token_pos=0,
            )
            results = calculator.calculate_absorption(
                sae,
                words=given["words"],
                probe_direction=torch.from_numpy(arrays[f"direction_{letter}"]),
                main_feature_ids=given["main"],
                layer=LAYER,
                show_progress=False,
            )
            found[letter] = [
                [float(each.absorption_fraction), bool(each.is_full_absorption)]
                for each in results.word_results
            ]
    content = {
        "version": importlib.metadata.version("sae-bench"),
        "sae_lens": importlib.metadata.version("sae-lens"),
        "letters": found,
    }
    Path(settings["results"]).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
