"""`saescope steer --dose`: the dose-response of a feature of a store, in words and as a file."""

from collections.abc import Sequence
from dataclasses import dataclass

from activations.models.language import Model
from sae.core.base import SparseAutoencoder
from sae.data.provenance import check_indexed
from sae.indexing.ends import feature_and_sign
from sae.steering.dose import DoseSettings, dose_response
from sae.steering.dose_result import SOURCES, DoseResponse, SweetSpot
from saescope.errors import InputError
from saescope.progress import say
from store import FeatureStore

FACTORS = (0.5, 1.0, 2.0, 4.0)
"""strengths, in units of the feature's largest activation"""
WORDS, TEXT_TOKENS, PROMPT_TOKENS = 10, 32, 8


@dataclass(frozen=True, kw_only=True)
class DoseRequest:
    """A feature of a store, and how its dose-response is measured."""

    feature: int
    """of the store: of a signed SAE, an end"""
    factors: tuple[float, ...] = FACTORS
    texts: int = 8
    new_tokens: int = 24
    temperature: float = 1.0
    nulls: int = 2
    seed: int = 0


def own_words(store: FeatureStore, feature: int) -> dict[str, list[int]]:
    """The tokens that a feature's decoder raises most, and those that were measured to rise most.

    Raises InputError for a store that has neither.
    """
    measured = store.measured_effects(feature)
    direct = [each.token_id for each in store.logits(feature).top[:WORDS]]
    raised = [each.token_id for each in measured.top[:WORDS]] if measured else []
    words = {name: ids for name, ids in (("direct", direct), ("measured", raised)) if ids}
    if not words:
        raise InputError("does not know which tokens features raise", where=str(store.path))
    return words


def held_out_texts(store: FeatureStore, count: int, length: int = TEXT_TOKENS) -> list[list[int]]:
    """The beginnings of held-out sequences, or of the last ones of a store that has none.

    Raises InputError for a store with fewer.
    """
    sql = "SELECT tokens FROM db.sequence ORDER BY split DESC, sequence LIMIT ?"
    found = [list(tokens[:length]) for (tokens,) in store.database.rows(sql, [count])]
    if len(found) < count:
        raise InputError(
            "has fewer sequences", where=str(store.path), given=len(found), allowed=str(count)
        )
    return found


def dose_of(
    model: Model,
    sae: SparseAutoencoder,
    store: FeatureStore,
    asked: DoseRequest,
    *,
    site: str | None = None,
    allow_other_model: bool = False,
) -> DoseResponse:
    """The dose-response of a store's feature on held-out text of the store.

    Raises InputError as `sae.dose_response` does, and for a feature that is never active;
    ArtefactError for a store of another SAE.
    """
    check_indexed(sae, store.meta, where=str(store.path))
    largest = store.feature(asked.feature).max
    if not largest > 0:
        raise InputError(
            "is never active, so its strengths have no unit", where="dose", given=asked.feature
        )
    number, sign = feature_and_sign(asked.feature, sae.d_sae if sae.signed else None)
    texts = held_out_texts(store, asked.texts)
    settings = DoseSettings(
        strengths=tuple(sign * factor * largest for factor in asked.factors),
        nulls=asked.nulls,
        prompt_tokens=min(PROMPT_TOKENS, max(1, min(map(len, texts)) - 2)),
        new_tokens=asked.new_tokens,
        temperature=asked.temperature,
        seed=asked.seed,
    )
    return dose_response(
        model,
        sae,
        number,
        texts=texts,
        words=own_words(store, asked.feature),
        settings=settings,
        site=site,
        allow_other_model=allow_other_model,
    )


def dose_lines(found: DoseResponse, factors: Sequence[float]) -> list[str]:
    """The dose-response as lines of text: effects and collateral by strength, and sweet spots."""
    words = found.words[-1]
    heads = f"{f'ln p of its words ({words})':<27}  {'word rate':<20}"
    lines = [f"  strength  source     {heads}  KL/token  delta CE  repeats"]
    table = found.table()
    for at, factor in enumerate(factors):
        for number, source in enumerate(SOURCES):
            row = table[number * len(factors) + at]
            target, rate = (
                f"{row[name]:{form}} ({row[f'{name}_low']:{form}} to {row[f'{name}_high']:{form}})"
                for name, form in ((f"target:{words}", "+.2f"), (f"word_rate:{words}", ".2f"))
            )
            lines.append(
                f"  {f'{factor:g}x' if not number else '':>8}  {source:<9}  {target:<27}"
                f"  {rate:<20}  {row['kl']:>8.3f}  {row['delta_ce']:>8.3f}"
                f"  {row['repetition']:>7.3f}"
            )
    for name in found.words:
        for metric, title in (("target", "by ln p"), ("word_rate", "by word rate")):
            spot = found.sweet_spot(metric, name)
            lines.append(f"{name} words, {title}: {spot_words(spot, found, factors)}")
    return lines


def spot_words(spot: SweetSpot, found: DoseResponse, factors: Sequence[float]) -> str:
    """A sweet spot in a line."""
    if spot.strength is None or spot.effect is None or spot.above_null is None:
        return "every strength costs 1 nat a token or more"
    unit = found.strengths[0] / factors[0]
    span = [f"{(each or 0) / unit:g}x" for each in (spot.strength_low, spot.strength_high)]
    return (
        f"best at {spot.strength / unit:g}x ({' to '.join(span)}): {spot.effect:.3f}, "
        f"{spot.above_null:+.3f} beside the null ({spot.above_null_low:+.3f} to "
        f"{spot.above_null_high:+.3f}), KL {spot.kl:.2f} nats a token"
    )


def print_dose(found: DoseResponse, factors: Sequence[float], out: str | None) -> dict[str, str]:
    """Say a dose-response and, if wanted, write it to a file; each sweet spot in words."""
    for line in dose_lines(found, factors):
        say(line, lines=True)
    if out is not None:
        found.save(out)
        say(f"{out}: written")
    return {
        name: spot_words(found.sweet_spot("word_rate", name), found, factors)
        for name in found.words
    }
