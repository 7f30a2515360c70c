"""What a language model makes of a store's features: scores of steering, and measured effects.

The effect of a feature that is measured is the mean change of the next token's log-probabilities
when the feature's decoder direction, times its mean activation, is added to the activation at
positions where the feature is active. Random directions of the same lengths, at the same positions,
say what that means: their effects are the null.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations.models.variants import Variants
from sae.data.placement import Placement
from sae.indexing.build import direct_logits
from sae.indexing.effect_plan import EffectPlan, plan_effects
from sae.indexing.effect_summary import Measured
from sae.indexing.ends import indexed
from sae.indexing.pending import Pending
from sae.steering.scores import AMPLIFIED, OWN_TOKENS, output_score, token_confidence
from saescope.errors import InputError
from saescope.progress import Progress
from store import FeatureStore

NULLS = 128
_ROWS = 128
"""variants run at once"""
_SEQUENCES, _PAIRS = 8, 512
"""the most sequences of a piece, and the pairs from which it is full"""


@dataclass(frozen=True)
class Directions:
    """What is added: features of an SAE as they write, and random directions after them."""

    vectors: Tensor
    """[d_sae + nulls, d_out]"""
    strength: Tensor
    """[d_sae + nulls]: the mean activation of a feature where it is active; 0 if left out"""
    d_sae: int
    stand_ins: NDArray[np.int64]
    """of each random direction the feature whose length, strength and positions it has"""

    @property
    def typical(self) -> Tensor:
        """Each direction at its typical strength."""
        return self.vectors * self.strength[:, None]

    @property
    def live(self) -> Tensor:
        """The numbers of those that are added anywhere: live features, and all random ones."""
        return self.strength.nonzero()[:, 0]


def directions_of(
    store: FeatureStore, placement: Placement, seed: int, features: int = 0
) -> Directions:
    """The directions of a store's features, and of a random one for some of them.

    Args: features is how many random live features are added; 0 for all live ones.

    Raises InputError for a crosscoder, or if the SAE has not the store's features.
    """
    sae = indexed(placement.sae)
    if len(placement.written) != 1 or placement.sae.concatenates:
        raise InputError(
            "a crosscoder writes at several sites at once, so none of its features can be added",
            where="effects",
            allowed="SAEs of one site, transcoders",
        )
    if sae.d_sae != store.d_sae:
        raise InputError(
            "has not the store's features", where="SAE", given=sae.d_sae, allowed=str(store.d_sae)
        )
    found = store.database.columns("SELECT n_active, mean FROM db.feature ORDER BY feature")
    mean = torch.from_numpy(np.where(found["n_active"] > 0, found["mean"], 0.0)).float()
    rng = np.random.default_rng(seed)
    live = rng.permutation(np.flatnonzero(found["n_active"]))[: features or None]
    mean[np.setdiff1d(np.arange(len(mean)), live)] = 0.0
    chosen = np.sort(rng.choice(live, min(NULLS, len(live)), replace=False))
    own = sae.W_dec.detach().float().cpu()
    drawn = torch.from_numpy(rng.standard_normal((len(chosen), own.shape[1]))).float()
    drawn *= own[chosen].norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
    return Directions(torch.cat([own, drawn]), torch.cat([mean, mean[chosen]]), sae.d_sae, chosen)


@torch.inference_mode()
def steering_scores(
    variants: Variants, placement: Placement, directions: Directions, prompt: str, pending: Pending
) -> dict[str, NDArray[np.float32]]:
    """Output score and change of token confidence of each direction (`sae.steering.scores`).

    NaN for dead features, and for all where no feature is active at the prompt's last token.
    """
    model = variants.model
    tokens = model.tokenize(prompt)
    if len(tokens) < 2:
        raise InputError("needs two tokens or more", where="prompt", given=prompt)
    at, (read,) = len(tokens) - 1, placement.read
    x = model.capture(torch.tensor([tokens]), [read])[read][0, at:].float()
    largest = max(placement.sae.encode_sparse(x).value.abs().tolist(), default=0.0)
    found = {
        name: np.full(len(directions.vectors), np.nan, np.float32)
        for name in ("output_score", "confidence_change")
    }
    if not largest > 0:
        return found
    text = variants.text(tokens)
    before = float(token_confidence(variants.logits(text.residual[at:]))[0])
    W_U, norm = model.unembedding()
    live = directions.live
    with Progress("scores of steering", len(live), "features") as progress:
        for number, rows in enumerate(live.split(_ROWS)):
            piece = pending.get("scores", number)
            if piece is None:
                vectors = directions.vectors[rows]
                logits = variants.logits(text.after(at, AMPLIFIED * largest * vectors))
                direct = direct_logits(vectors, W_U, norm, centred=model.final_norm_centres)
                own = direct.topk(min(OWN_TOKENS, direct.shape[1]), dim=1).indices
                change = token_confidence(logits) - before
                scores = output_score(logits, own)
                piece = {"output_score": scores.numpy(), "confidence_change": change.numpy()}
                pending.put("scores", number, piece)
            for name, values in found.items():
                values[rows.numpy()] = piece[name]
            progress.advance(len(rows))
    return found


@torch.inference_mode()
def measured_residuals(
    store: FeatureStore,
    variants: Variants,
    directions: Directions,
    plan: EffectPlan,
    pending: Pending,
    seconds: float,
) -> Measured:
    """Residual streams behind the last block of all pairs of a plan, as far as the time goes.

    What an earlier, killed run had measured is there already, and takes no time.
    """
    parts = plan.sequences()
    typical = directions.typical
    start = time.monotonic()
    pieces: list[Mapping[str, NDArray[Any]]] = []
    with Progress("effects through the network", len(plan.direction), "positions") as progress:
        for number, several in enumerate(_pieces(parts)):
            whole = slice(several[0].start, several[-1].stop)
            piece = pending.get("effects", number)
            if piece is None and time.monotonic() - start > seconds:
                break
            if piece is None:
                piece = _joined(_of_sequences(store, variants, typical, plan, several))
                pending.put("effects", number, piece)
            pieces.append(piece)
            progress.advance(whole.stop - whole.start)
    found = _joined(iter(pieces)) if pieces else None
    done = 0 if found is None else len(found["after"])
    nothing = np.zeros((0, variants.model.d_model), np.float32)
    return Measured(
        direction=plan.direction[:done],
        after=nothing if found is None else found["after"],
        before=nothing if found is None else found["before"],
    )


def _pieces(parts: list[slice]) -> Iterator[list[slice]]:
    """Sequences that are measured together, and committed."""
    several: list[slice] = []
    for part in parts:
        several.append(part)
        if len(several) == _SEQUENCES or part.stop - several[0].start >= _PAIRS:
            yield several
            several = []
    if several:
        yield several


def _joined(pieces: Iterator[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    several = list(pieces)
    return {name: np.concatenate([each[name] for each in several]) for name in several[0]}


def _of_sequences(
    store: FeatureStore,
    variants: Variants,
    typical: Tensor,
    plan: EffectPlan,
    several: list[slice],
) -> Iterator[dict[str, NDArray[Any]]]:
    """Residual streams with and without what is added, [pairs, d_model] each, by sequence."""
    for pairs in several:
        at = torch.from_numpy(plan.index[pairs])
        [(tokens,)] = store.database.rows(
            "SELECT tokens FROM db.sequence WHERE sequence = ?", [int(plan.sequence[pairs.start])]
        )
        text = variants.text(tokens[: int(at.max()) + 1])
        change = typical[torch.from_numpy(plan.direction[pairs])]
        after = [
            text.after_each(where, rows).cpu()
            for where, rows in zip(at.split(_ROWS), change.split(_ROWS), strict=True)
        ]
        before = text.residual[at.to(text.residual.device)].cpu()
        yield {"after": torch.cat(after).numpy(), "before": before.numpy()}


def plan_of(store: FeatureStore, directions: Directions, positions: int, seed: int) -> EffectPlan:
    """Where these directions are added."""
    features = directions.live[directions.live < directions.d_sae].numpy()
    return plan_effects(store, positions, features, directions.stand_ins, seed)
