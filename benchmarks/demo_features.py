"""Write docs/reports/demo_features.md: random live features of a store, with their top examples.

    python benchmarks/demo_features.py stores/smollm2-135m-topk --features 20 --seed 0

The features are drawn before anything of them is looked at. The verdicts on their themes are
people's: they are read from docs/reports/demo_themes.toml (feature id = "theme", "" where none is
evident).
"""

import argparse
import tomllib
from pathlib import Path

import numpy as np

from saescope.progress import say
from store import FeatureStore
from store.database import STORE_FILE
from store.results import Example

ROOT = Path(__file__).resolve().parents[1]


def drawn(store: FeatureStore, count: int, seed: int) -> list[int]:
    """Random live features, in the order drawn."""
    live = np.flatnonzero(store.densities() > 0)
    return np.random.default_rng(seed).choice(live, size=count, replace=False).tolist()


def line(example: Example) -> str:
    """One example: its window, with the strongest token marked."""
    pieces = list(example.tokens)
    focus = pieces[example.index - example.start]
    word = focus.strip()
    if word:
        pieces[example.index - example.start] = focus.replace(word, f"**{word}**", 1)
    text = "".join(pieces).replace("\n", "⏎").replace("<", "&lt;")
    return f"- {example.activation:.1f} · {text.strip()}"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    themes_file = ROOT / "docs" / "reports" / "demo_themes.toml"
    themes = tomllib.loads(themes_file.read_text()) if themes_file.exists() else {}
    with FeatureStore.open(arguments.store / STORE_FILE) as store:
        chosen = drawn(store, arguments.features, arguments.seed)
        judged = [str(feature) for feature in chosen if str(feature) in themes]
        evident = sum(bool(themes[feature]) for feature in judged)
        parts = [
            "# Twenty random features of the default run",
            "",
            f"Drawn with seed {arguments.seed} from the live features of `{arguments.store}` by "
            "`benchmarks/demo_features.py`, before anything of them was looked at, and listed as "
            f"they came. An evident common theme was seen in {evident} of {len(chosen)}. Each line "
            "is one of the strongest examples, at most one a sequence: activation, and the text "
            "around the **strongest token**.",
        ]
        for feature in chosen:
            row = store.feature(feature)
            theme = themes.get(str(feature))
            verdict = "not judged" if theme is None else theme or "no evident theme"
            parts += [
                "",
                f"## Feature {feature}: {verdict}",
                "",
                f"density {100 * row.density:.3f}%, largest activation {row.max:.1f}",
                "",
                *map(line, store.examples(feature, "top", window=10)[: arguments.examples]),
            ]
    target = ROOT / "docs" / "reports" / "demo_features.md"
    target.write_text("\n".join(parts) + "\n", encoding="utf-8")
    say(f"{target.relative_to(ROOT)}: {evident} of {len(chosen)} judged to have a theme")


if __name__ == "__main__":
    main()
