r"""Which features raise their own words in generated text, at one collateral for all of them.

    saescope effects STORE
    python -m benchmarks.steering_texts --store STORE

The success of Arad et al. (2025, arXiv 2505.20063): how many tokens of a text that the steered
model writes are among the 20 that the feature's decoder raises most ("direct"; or the 10 measured
to rise most, "measured"). Random live features and random directions are each added at every kept
position, at the strength at which the KL divergence from the unsteered model on held-out text comes
nearest to `kl`, and stays below 1 nat a token. The model goes on after some neutral beginnings, for
all directions with the same random numbers. A row a feature and set of words:

    count      mean number of own words in a text, as drawn
    expected   the same by the probabilities that each token was drawn from: chance moves it less
    unsteered_expected, random_count, random_expected
               of the same words without steering, and with random directions (mean)
    random_most
               the most that any of them expects: a feature `succeeds` that expects more, which of
               features that are as good as random one in `nulls` + 1 does

An interrupted run goes on: features that the file has are not run again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.models.language import Model
from activations.sites.kept import TokenPositions, prompt_of
from benchmarks.running import run
from benchmarks.steering_bench import chosen_features, write_page
from benchmarks.steering_texts_page import COLUMNS
from sae.bench import rows as results
from sae.commands.dose import held_out_texts
from sae.commands.effects import EffectsConfig, loaded
from sae.core.base import SparseAutoencoder
from sae.indexing.build import direct_logits
from sae.steering.dose import gumbel
from sae.steering.dose_result import MOST_KL
from sae.steering.scores import OWN_TOKENS
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.progress import Progress, say
from store import FeatureStore
from store.measured import EFFECTS

PROMPTS = (
    "On the way home,",
    "My neighbour says that",
    "The letter began with",
    "Last week we found",
    "As far as anyone knows,",
    "The book is about",
    "He was told that",
    "In that year,",
    "What nobody mentioned is",
    "The answer was simple:",
    "Early in the morning,",
    "She wrote down that",
    "The report found that",
    "Most of the time,",
    "We are not sure whether",
    "There is a story about",
    "Before the meeting,",
    "It turned out that",
    "The next page shows",
    "To my surprise,",
)
"""neutral beginnings"""
_ROUNDS = 4
"""strengths that are tried of each direction"""
_START = 48.0
"""length of what is added in the first of them"""
_WHOLE = 32
"""whole texts with all their logits that are run at once"""
Written = Mapping[str, tuple[Tensor, Tensor]]
"""by set of words, what `written` returns"""


@dataclass(frozen=True, kw_only=True)
class SteeringTextsConfig(Config):
    """Measure how far random live features of a store raise their own words in generated text."""

    store: str
    """Folder of a feature store with effects."""
    features: int = 200
    """How many features."""
    prompts: int = 10
    """Beginnings that are continued."""
    new_tokens: int = 20
    """Tokens of a continuation."""
    temperature: float = 0.7
    """Of the continuations."""
    kl: float = 0.7
    """Collateral that is aimed at, in nats a token."""
    texts: int = 4
    """Held-out texts on which it is measured."""
    text_tokens: int = 14
    """Tokens of each."""
    nulls: int = 20
    """Random directions."""
    together: int = 50
    """Features that are run at once, and written."""
    seed: int = 0
    """Seed of all random choices."""
    results: str = "benchmarks/results/steering_texts.csv"
    """File that rows are added to."""
    page: str = "docs/reports/steering.md"
    """The page that is written, with the rows of `python -m benchmarks.steering_bench`."""

    def __post_init__(self) -> None:
        check_range("prompts", self.prompts, low=1, high=len(PROMPTS))
        check_range("kl", self.kl, above=0, below=MOST_KL)
        for name in ("features", "new_tokens", "nulls", "together", "texts"):
            check_range(name, getattr(self, name), low=1)
        check_range("temperature", self.temperature, above=0)
        check_range("text_tokens", self.text_tokens, low=2)


@contextmanager
def adding(model: Model, site: str, rows: Tensor) -> Iterator[None]:
    """While it lasts, each text of a batch has its row [texts, d] added at its kept positions."""

    def add(h: Tensor, at: TokenPositions) -> Tensor:
        return torch.where(at.kept[..., None].to(h.device), h + rows[:, None].to(h), h)

    with model.edit_with_positions({site: add}):
        yield


def collateral(model: Model, site: str, rows: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """KL divergence [n] of the unsteered model from each steered one, in nats a token."""
    found = torch.zeros(len(rows))
    for text in texts:
        tokens = torch.tensor([list(text)])
        before = model.logits(tokens)[0, 1:].float().log_softmax(-1)
        parts = []
        for some in rows.split(_WHOLE):
            with adding(model, site, some):
                after = model.logits(tokens.expand(len(some), -1))[:, 1:].float().log_softmax(-1)
            parts.append((before.exp() * (before - after)).sum(-1).mean(1))
        found += torch.cat(parts) / len(texts)
    return found


def calibrated(
    model: Model, site: str, vectors: Tensor, texts: Sequence[Sequence[int]], aim: float
) -> tuple[Tensor, Tensor]:
    """Strengths [n] of directions and their collateral: the most that was tried below MOST_KL.

    KL grows about with the square of the strength, so that the next one to try is known.
    """
    tried = _START / vectors.norm(dim=1)
    strength, kl = torch.zeros_like(tried), torch.zeros_like(tried)
    for _ in range(_ROUNDS):
        found = collateral(model, site, tried[:, None] * vectors, texts)
        near = (found < MOST_KL) & ((found - aim).abs() < (kl - aim).abs())
        strength, kl = torch.where(near, tried, strength), torch.where(near, found, kl)
        tried = tried * (aim / found.clamp_min(1e-6)).sqrt().clamp(0.25, 4)
    return strength, kl


def written(
    model: Model, site: str, rows: Tensor, words: Mapping[str, Tensor], config: SteeringTextsConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """How many tokens of a text are certain words, mean over beginnings: as drawn, and expected.

    Args: words are by name the ids [sets, r] of so many sets of words.

    Returns by name [n, sets] twice, a row a direction.
    """
    found = {name: (torch.zeros(()), torch.zeros(())) for name in words}
    for number, prompt in enumerate(PROMPTS[: config.prompts]):
        generator = torch.Generator().manual_seed(1_000_003 * (config.seed + 1) + number)
        new = torch.tensor([model.tokenize(prompt)]).expand(len(rows), -1)
        length, past = new.shape[1], None
        with adding(model, site, rows):
            for _ in range(config.new_tokens):
                cached = {} if past is None else {"past_key_values": past}
                with prompt_of(length):
                    out = model.hf(input_ids=new, use_cache=True, **cached)
                past = out.past_key_values
                logits = out.logits[:, -1].float() / config.temperature
                new = (logits + gumbel(logits.shape[1], generator)).argmax(1, keepdim=True)
                p = logits.softmax(1)
                for name, ids in words.items():
                    count, expected = found[name]
                    hit = (ids == new[:, :, None]).any(2).float() / config.prompts
                    chance = p[:, ids.flatten()].unflatten(1, ids.shape).sum(2) / config.prompts
                    found[name] = (count + hit, expected + chance)
    return found


def word_sets(
    store: FeatureStore, model: Model, sae: SparseAutoencoder, features: Sequence[int]
) -> dict[str, Tensor]:
    """[features, r]: the tokens that decoders raise most, and those measured to rise most."""
    W_U, norm = model.unembedding()
    direct = direct_logits(
        sae.W_dec[list(features)].float(), W_U, norm, centred=model.final_norm_centres
    )
    effects = store.measured_effects_of(features)
    known = [each for each in map(effects.__getitem__, features) if each is not None]
    measured = [[each.token_id for each in effect.top] for effect in known]
    least = min(map(len, measured))
    return {
        "direct": direct.topk(OWN_TOKENS, dim=1).indices,
        "measured": torch.tensor([each[:least] for each in measured]),
    }


@torch.inference_mode()
def bench(config: SteeringTextsConfig) -> None:
    """Run every feature that the file has not, and add its rows."""
    path = Path(config.results)
    with FeatureStore.open(config.store) as store:
        if EFFECTS not in store.meta:
            raise InputError("has no effects; `saescope effects` adds them", where=config.store)
        variants, placement = loaded(store, EffectsConfig(store=config.store))
        model, site, sae = variants.model, placement.written[0], placement.sae
        name = str(store.meta["name"])
        done = {int(r["feature"]) for r in results.read(path, COLUMNS) if r["store"] == name}
        chosen = chosen_features(store, config.features, config.seed)
        left = [each for each in chosen if each not in done]
        if not left:
            say(f"{path}: has all of them")
            write_page(name, config.page, texts=config.results)
            return
        sets = word_sets(store, model, sae, chosen)
        texts = held_out_texts(store, config.texts, config.text_tokens)
        null = _null(model, site, sae, sets, texts, config)
        facts = {n: v for n, v in results.facts("cpu").items() if n in COLUMNS}
        with Progress("texts of features", len(left), "features") as progress:
            for start in range(0, len(left), config.together):
                some = left[start : start + config.together]
                at = [chosen.index(each) for each in some]
                vectors = sae.W_dec[some].float()
                strength, kl = calibrated(model, site, vectors, texts, config.kl)
                steered = written(model, site, strength[:, None] * vectors, sets, config)
                rows = _rows(store, some, at, steered, null)
                made = zip(strength.tolist() * len(sets), kl.tolist() * len(sets), strict=True)
                for row, (amount, cost) in zip(rows, made, strict=True):
                    row |= {"strength": amount / row["largest"], "kl": cost, "store": name}
                    row |= {n: getattr(config, n) for n in ("prompts", "new_tokens")}
                    row |= {n: getattr(config, n) for n in ("temperature", "nulls", "seed")}
                results.append(path, [{**row, **facts} for row in rows], COLUMNS)
                progress.advance(len(some))
    write_page(name, config.page, texts=config.results)


def _null(
    model: Model,
    site: str,
    sae: SparseAutoencoder,
    sets: Mapping[str, Tensor],
    texts: Sequence[Sequence[int]],
    config: SteeringTextsConfig,
) -> Written:
    """What is written without steering (the first row), and with random directions."""
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randn(config.nulls, sae.W_dec.shape[1], generator=generator)
    strength, kl = calibrated(model, site, drawn, texts, config.kl)
    say(f"random directions: KL {float(kl.min()):.2f} to {float(kl.max()):.2f} nats a token")
    rows = torch.cat([torch.zeros(1, drawn.shape[1]), strength[:, None] * drawn])
    return written(model, site, rows, sets, config)


def _rows(
    store: FeatureStore,
    features: Sequence[int],
    at: Sequence[int],
    steered: Written,
    null: Written,
) -> list[dict[str, Any]]:
    """A row a set of words and feature. Args: at says which sets of words are the features'."""
    rows = []
    for words, (count, expected) in steered.items():
        other_count, other = null[words]
        for number, (feature, own) in enumerate(zip(features, at, strict=True)):
            facts, mine = store.feature(feature), float(expected[number, own])
            unsteered, random = float(other[0, own]), other[1:, own]
            scores = ("output_score", "confidence_change", "measured_kl")
            rows.append(
                {
                    "feature": feature,
                    "words": words,
                    **{n: facts.more.get(n) for n in scores},
                    "largest": facts.max,
                    "count": float(count[number, own]),
                    "expected": mine,
                    "unsteered_expected": unsteered,
                    "random_count": float(other_count[1:, own].mean()),
                    "random_expected": float(random.mean()),
                    "random_most": float(random.max()),
                    "succeeds": int(mine > float(random.max())),
                }
            )
    return rows


if __name__ == "__main__":
    run(SteeringTextsConfig, bench)
