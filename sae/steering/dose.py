"""Dose-response: what steering with a feature does at several strengths, beside nulls.

A feature's decoder direction is added at every kept position, as `sae.steer(add=...)` does. Beside
it stand random directions and features of an untrained SAE, of the same norm. At each strength:

    effects       word_rate    share of generated tokens that are the feature's words
                  target       mean change of the log-probability that the next token is one of
                               them, on held-out text, in nats
                  probe        mean change along a direction at another site, where one is given
    collateral    kl           mean KL divergence of the unsteered model from the steered one, a
                               token of held-out text, in nats: sum p_0 (ln p_0 - ln p)
                  delta_ce     mean rise of cross-entropy on the same text, in nats
                  repetition   share of generated triples of tokens that stood before in the text
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.models.language import Model
from activations.sites.kept import TokenPositions, prompt_of
from sae.core.base import SparseAutoencoder
from sae.steering.dose_result import SOURCES, DoseResponse
from sae.steering.steer import placement_in
from saescope.errors import InputError, check_range
from saescope.integers import as_index, as_indices
from saescope.progress import Progress

_ROWS, _WHOLE = 96, 16
"""continuations, and whole texts with all their logits, that are run at once"""
Probe = tuple[str, Float[Tensor, " d"]]
"""a site, and a direction there"""


@dataclass(frozen=True, kw_only=True)
class DoseSettings:
    """How a dose-response is measured."""

    strengths: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0)
    """in the model's units: of activation times decoder row"""
    nulls: int = 2
    """random directions, and as many features of an untrained SAE"""
    prompt_tokens: int = 8
    """of each text, which are continued"""
    new_tokens: int = 24
    temperature: float = 1.0
    """of the continuations; 0 takes the likeliest token"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("nulls", 1), ("prompt_tokens", 1), ("new_tokens", 3)):
            check_range(name, getattr(self, name), low=low)
        check_range("temperature", self.temperature, low=0)
        finite = all(np.isfinite(each) for each in self.strengths)
        if not self.strengths or not finite or len(set(self.strengths)) < len(self.strengths):
            raise InputError(
                "wants different, finite numbers", where="strengths", given=self.strengths
            )


@torch.inference_mode()
def dose_response(
    model: Model,
    sae: SparseAutoencoder,
    feature: int,
    *,
    texts: Sequence[Sequence[int]],
    words: Mapping[str, Sequence[int]],
    settings: DoseSettings | None = None,
    probe: Probe | None = None,
    site: str | None = None,
    allow_other_model: bool = False,
) -> DoseResponse:
    """What adding a feature's direction does at each strength, beside random and untrained ones.

    Args:
        texts: held-out texts as token ids, each longer than `prompt_tokens`: their beginnings are
            continued, and collateral is measured on the whole of them.
        words: named sets of token ids that count as the feature's words, as those that its decoder
            raises most; each has a word_rate and a target of its own.
        settings: strengths, sampling, and how many directions mean nothing.
        probe: a site behind the feature's, and a direction there.
        site: where, if not the site the SAE was trained at; which layer, for one of several.

    Raises InputError as `sae.steer` does, and for no texts or words, or texts that are too short.

    >>> found = dose_response(model, sae, 123, texts=texts, words={"own": [9]})  # doctest: +SKIP
    >>> found.sweet_spot("word_rate", "own")                                     # doctest: +SKIP
    """
    given = settings or DoseSettings()
    placement = placement_in(model, sae, site, where="dose", allow_other_model=allow_other_model)
    own = placement.sae
    number = as_index(feature, where="feature", low=0, high=own.d_sae - 1, what="no such feature")
    sets = {
        name: as_indices(each, where=f"words[{name}]", low=0, high=model.d_vocab - 1)
        for name, each in words.items()
    }
    if not sets or not all(sets.values()):
        raise InputError("has no tokens", where="words", given=dict(words))
    inputs = _checked(texts, given.prompt_tokens, model.d_vocab)
    directions, sources = _directions(own, number, given)
    strengths = torch.tensor(given.strengths)
    rows = (directions[:, None] * strengths[None, :, None]).flatten(0, 1)
    meter = _Meter(model, placement.written[0], rows, sets, probe, given)
    with Progress("dose-response", len(inputs), "texts") as progress:
        found = []
        written = meter.continuations(inputs)
        for text, ids in zip(inputs, written, strict=True):
            found.append(meter.measure(torch.tensor(text, device=model.device), ids))
            progress.advance(1)
    shape = (len(sources), len(given.strengths))
    values = {
        name: np.stack([each[name].reshape(shape) for each in found], axis=-1) for name in found[0]
    }
    return DoseResponse(
        feature=number, strengths=given.strengths, sources=sources, words=tuple(sets), values=values
    )


def _checked(texts: Sequence[Sequence[int]], prompt: int, d_vocab: int) -> list[list[int]]:
    """Texts as token ids. InputError unless each is longer than its prompt."""
    inputs = [as_indices(each, where="texts", low=0, high=d_vocab - 1) for each in texts]
    if not inputs or min(map(len, inputs)) <= prompt:
        raise InputError(
            "each has to be longer than its prompt",
            where="texts",
            given=sorted({len(each) for each in inputs})[:3],
            allowed=f"more than {prompt} tokens",
        )
    return inputs


def _directions(
    sae: SparseAutoencoder, feature: int, given: DoseSettings
) -> tuple[Float[Tensor, "directions d"], tuple[str, ...]]:
    """The feature's direction, random ones, and an untrained SAE's, all of one norm."""
    own = sae.W_dec[feature].detach().float().cpu()
    generator = torch.Generator().manual_seed(given.seed)
    random = torch.randn(given.nulls, len(own), generator=generator)
    fresh = sae.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given.seed)
        fresh.reset_parameters()
    chosen = torch.randperm(sae.d_sae, generator=generator)[: given.nulls]
    untrained = fresh.W_dec.detach().float().cpu()[chosen]
    rows = torch.cat([own[None], random, untrained])
    rows *= own.norm() / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    counts = (1, len(random), len(untrained))
    names = [name for name, count in zip(SOURCES, counts, strict=True) for _ in range(count)]
    return rows, tuple(names)


class _Meter:
    """Measures all directions and strengths on one text after the other."""

    def __init__(
        self,
        model: Model,
        site: str,
        rows: Float[Tensor, "rows d"],
        words: Mapping[str, Sequence[int]],
        probe: Probe | None,
        given: DoseSettings,
    ) -> None:
        self._model, self._site, self._given, self._probe = model, site, given, probe
        self._rows = rows.to(model.device)
        self._words = {
            name: torch.tensor(each, device=model.device) for name, each in words.items()
        }

    def measure(self, text: Tensor, written: Tensor) -> dict[str, np.ndarray]:
        """Every metric of one text [rows], of which all rows' continuations are written."""
        before = self._model.logits(text[None])[0].float().log_softmax(-1)
        plain = None if self._probe is None else self._along(text[None])[0]
        parts: list[dict[str, Tensor]] = []
        for rows in self._rows.split(_WHOLE):
            with self._steered(rows):
                batch = text.expand(len(rows), -1)
                after = self._model.logits(batch).float().log_softmax(-1)
                part = self._collateral(before, after, text)
                if plain is not None:
                    part["probe"] = self._along(batch) - plain
            parts.append(part)
        joined = {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
        joined |= self._of_continuation(written)
        return {name: each.cpu().numpy() for name, each in joined.items()}

    @contextmanager
    def _steered(self, rows: Tensor) -> Iterator[None]:
        def add(h: Tensor, at: TokenPositions) -> Tensor:
            kept = at.kept.to(h.device)[..., None]
            return torch.where(kept, (h.float() + rows[:, None]).to(h.dtype), h)

        with self._model.edit_with_positions({self._site: add}):
            yield

    def _along(self, batch: Tensor) -> Tensor:
        """Mean projection on the probe's direction over positions behind the first [rows]."""
        assert self._probe is not None
        site, direction = self._probe
        h = self._model.capture(batch, [site])[site][:, 1:].float()
        return (h @ (direction.to(h.device, h.dtype) / direction.norm())).mean(1)

    def _collateral(self, before: Tensor, after: Tensor, text: Tensor) -> dict[str, Tensor]:
        """KL, rise of cross-entropy and change of targets, over positions behind the first."""
        change = after[:, 1:] - before[1:]
        found = {"kl": -(before[1:].exp() * change).sum(-1).mean(1)}
        following = text[2:].expand(len(after), -1)[..., None]
        found["delta_ce"] = -change[:, :-1].gather(-1, following)[..., 0].mean(1)
        for name, words in self._words.items():
            old = before[1:, words].logsumexp(-1)
            found[f"target:{name}"] = (after[:, 1:, words].logsumexp(-1) - old).mean(1)
        return found

    def continuations(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts and their continuations [texts, rows, tokens].

        Those of one text are drawn by the same numbers, whatever steers them.
        """
        given, several = self._given, len(self._rows)
        prompts = torch.tensor([each[: given.prompt_tokens] for each in texts])
        prompts = prompts.to(self._model.device).repeat_interleave(several, 0)
        of_text = torch.arange(len(texts)).repeat_interleave(several)
        rows = self._rows.repeat(len(texts), 1)
        parts = []
        for ids, change, text in zip(
            prompts.split(_ROWS), rows.split(_ROWS), of_text.split(_ROWS), strict=True
        ):
            with self._steered(change):
                parts.append(self._continued(ids, text.tolist()))
        return torch.cat(parts).unflatten(0, (len(texts), several))

    def _continued(self, ids: Tensor, texts: list[int]) -> Tensor:
        """Prompts [rows, tokens] and their continuations; texts are the numbers of their texts."""
        given = self._given
        generators = {
            each: torch.Generator().manual_seed(1_000_003 * (given.seed + 1) + each)
            for each in dict.fromkeys(texts)
        }
        past, new = None, ids
        for _ in range(given.new_tokens):
            inputs = ids if past is None else new
            cached: dict[str, Any] = {} if past is None else {"past_key_values": past}
            with prompt_of(given.prompt_tokens):
                out = self._model.hf(input_ids=inputs, use_cache=True, **cached)
            past = getattr(out, "past_key_values", None)
            logits = out.logits[:, -1].float()
            if given.temperature > 0:  # the largest with Gumbel noise is drawn by its probability
                noise = {n: gumbel(logits.shape[1], each) for n, each in generators.items()}
                drawn = torch.stack([noise[each] for each in texts]).to(logits.device)
                logits = logits / given.temperature + drawn
            new = logits.argmax(1, keepdim=True)
            ids = torch.cat([ids, new], 1)
        return ids

    def _of_continuation(self, ids: Tensor) -> dict[str, Tensor]:
        start = self._given.prompt_tokens
        found = {
            f"word_rate:{name}": torch.isin(ids[:, start:], words).float().mean(1)
            for name, words in self._words.items()
        }
        shares = [repetition(row, start) for row in ids.tolist()]
        return {**found, "repetition": torch.tensor(shares)}


def gumbel(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Numbers that, added to log-probabilities, make the largest one a draw from these."""
    uniform = torch.rand(count, generator=generator).clamp_min(1e-30)
    return -(-uniform.log()).clamp_min(1e-30).log()


def repetition(tokens: Sequence[int], start: int, length: int = 3) -> float:
    """Share of a continuation's runs of `length` tokens that stood before in the text.

    Args: start is where the continuation begins.

    >>> repetition([5, 1, 2, 3, 1, 2, 3], 1)  # of (1 2 3) (2 3 1) (3 1 2) (1 2 3) the last
    0.25
    """
    runs = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    own = range(start, len(runs))
    return sum(runs[i] in runs[:i] for i in own) / len(own) if len(own) else 0.0
