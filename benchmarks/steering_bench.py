r"""Whether features that should steer do: dose-responses of random live features of a store.

    python -m benchmarks.steering_bench --store stores/smollm2-135m-topk-quick

The store has effects (`saescope effects`). Of each feature the words are the tokens that its
decoder raises most ("direct") and those that were measured to rise most ("measured"). A row a
feature and set of words: the sweet spot, its collateral, the null, and whether the effect is above
the null; and the same of a random direction of the same norm in the feature's stead, judged by the
same words. An interrupted run goes on: features that the file has are not run again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activations.models.language import Model
from benchmarks.charts import write_bars
from benchmarks.effect_agreement import COLUMNS as AGREEMENT_COLUMNS
from benchmarks.running import run
from benchmarks.steering_page import FIGURE, figure, page
from benchmarks.steering_texts_page import COLUMNS as TEXTS_COLUMNS
from benchmarks.steering_texts_page import section
from sae.bench import rows as results
from sae.commands.dose import held_out_texts, own_words
from sae.commands.effects import EffectsConfig, loaded
from sae.core.base import SparseAutoencoder
from sae.steering.dose import DoseSettings, dose_response
from sae.steering.dose_result import DoseResponse
from saescope.config import Config
from saescope.errors import InputError
from saescope.progress import say
from store import FeatureStore
from store.measured import EFFECTS

COLUMNS = (
    "date", "store", "feature", "words", "output_score", "confidence_change", "measured_kl",
    "largest", "strength", "strength_low", "strength_high", "rate", "rate_low", "rate_high",
    "null", "above_null", "above_null_low", "above_null_high", "kl", "delta_ce", "repetition",
    "succeeds", "target", "target_above_null_low", "target_succeeds",
    "null_succeeds", "target_null_succeeds", "texts", "new_tokens", "seed", "processor", "threads",
    "saescope", "commit",
)  # fmt: skip
FACTORS = (1.0, 2.0, 4.0)
"""strengths, in units of the feature's largest activation"""


@dataclass(frozen=True, kw_only=True)
class SteeringBenchConfig(Config):
    """Measure dose-responses of random live features of a store."""

    store: str
    """Folder of a feature store with effects."""
    features: int = 50
    """How many features."""
    texts: int = 5
    """Held-out texts, each continued and used for collateral."""
    text_tokens: int = 14
    """Tokens of each."""
    prompt_tokens: int = 6
    """Of these, how many are continued."""
    new_tokens: int = 10
    """Tokens of a continuation."""
    nulls: int = 1
    """Random directions, and features of an untrained SAE, beside each feature."""
    seed: int = 0
    """Seed of all random choices."""
    results: str = "benchmarks/results/steering_bench.csv"
    """File that rows are added to."""
    agreement: str = "benchmarks/results/effect_agreement.csv"
    """Rows of `python -m benchmarks.effect_agreement`, for the page."""
    page: str = "docs/reports/steering.md"
    """The page that is written; its figure goes into images/ beside it."""


def chosen_features(store: FeatureStore, count: int, seed: int) -> list[int]:
    """Random features whose effects were measured, in the order in which they were drawn."""
    sql = "SELECT feature FROM db.feature WHERE measured_positions > 0 ORDER BY feature"
    known = np.array([number for (number,) in store.database.rows(sql)], np.int64)
    return np.random.default_rng(seed).permutation(known)[:count].tolist()


def bench(config: SteeringBenchConfig) -> None:
    """Run every feature that the file has not, add its rows, and write the page."""
    path = Path(config.results)
    with FeatureStore.open(config.store) as store:
        if EFFECTS not in store.meta:
            raise InputError("has no effects; `saescope effects` adds them", where=config.store)
        variants, placement = loaded(store, EffectsConfig(store=config.store))
        name = str(store.meta["name"])
        done = {int(r["feature"]) for r in results.read(path, COLUMNS) if r["store"] == name}
        features = chosen_features(store, config.features, config.seed)
        texts = held_out_texts(store, config.texts, config.text_tokens)
        for number, feature in enumerate(features):
            if feature in done:
                continue
            rows = _of_feature(store, variants.model, placement.sae, feature, texts, config)
            machine = results.facts("cpu")
            written = [
                {**{n: v for n, v in machine.items() if n in COLUMNS}, "store": name, **row}
                for row in rows
            ]
            results.append(path, written, COLUMNS)
            spots = ", ".join(f"{r['words']} {r['rate']} at KL {r['kl']}" for r in rows)
            say(f"{number + 1} of {len(features)}: feature {feature}: {spots}")
    write_page(name, config.page, bench=config.results, agreement=config.agreement)


def write_page(
    store: str,
    page_path: str,
    *,
    bench: str = "benchmarks/results/steering_bench.csv",
    texts: str = "benchmarks/results/steering_texts.csv",
    agreement: str = "benchmarks/results/effect_agreement.csv",
) -> None:
    """Write the report of a store's features and its figure, from the rows in these files."""
    rows = [row for row in results.read(Path(bench), COLUMNS) if row["store"] == store]
    if not rows:
        say(f"{page_path}: not written, as {bench} has no rows of {store}")
        return
    written = [row for row in results.read(Path(texts), TEXTS_COLUMNS) if row["store"] == store]
    foretold = results.read(Path(agreement), AGREEMENT_COLUMNS)
    write_bars(Path(page_path).parent / FIGURE, figure(rows), x="share of features that succeed")
    Path(page_path).write_text(page(rows, foretold, section(written)), encoding="utf-8")
    say(f"{page_path}: written")


def _of_feature(
    store: FeatureStore,
    model: Model,
    sae: SparseAutoencoder,
    feature: int,
    texts: Sequence[Sequence[int]],
    config: SteeringBenchConfig,
) -> list[dict[str, Any]]:
    facts = store.feature(feature)
    words = own_words(store, feature)
    settings = DoseSettings(
        strengths=tuple(factor * facts.max for factor in FACTORS),
        nulls=config.nulls,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        seed=config.seed + feature,
    )
    found = dose_response(
        model, sae, feature, texts=texts, words=words, settings=settings,
        site=None if sae.transcodes else str(store.meta["site"]),
    )  # fmt: skip
    scores = ("output_score", "confidence_change", "measured_kl")
    shared = {
        "feature": feature, **{name: facts.more.get(name) for name in scores},
        "largest": facts.max, "texts": len(texts), "new_tokens": config.new_tokens,
        "seed": config.seed,
    }  # fmt: skip
    return [{**shared, "words": name, **_row(found, name, facts.max)} for name in words]


def _row(found: DoseResponse, words: str, largest: float) -> dict[str, Any]:
    spot, target = found.sweet_spot("word_rate", words), found.sweet_spot("target", words)
    other = found.sources.index("random")
    null = found.sweet_spot("word_rate", words, direction=other)
    target_null = found.sweet_spot("target", words, direction=other)
    row = {
        "strength": spot.strength, "strength_low": spot.strength_low,
        "strength_high": spot.strength_high, "rate": spot.effect, "rate_low": spot.effect_low,
        "rate_high": spot.effect_high, "null": spot.null, "above_null": spot.above_null,
        "above_null_low": spot.above_null_low, "above_null_high": spot.above_null_high,
        "kl": spot.kl, "succeeds": int(spot.succeeds), "target": target.effect,
        "target_above_null_low": target.above_null_low,
        "target_succeeds": int(target.succeeds), "null_succeeds": int(null.succeeds),
        "target_null_succeeds": int(target_null.succeeds),
    }  # fmt: skip
    for name in ("strength", "strength_low", "strength_high"):
        row[name] = None if row[name] is None else round(row[name] / largest, 4)
    if spot.strength is not None:
        at = found.strengths.index(spot.strength)
        for name in ("delta_ce", "repetition"):
            row[name] = float(found.metric(name)[0, at].mean())
    return row


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(SteeringBenchConfig, bench)
