"""The prefix-length test: how long a repeat must be for an induction feature, or head, to act.

An induction feature says that a token comes next because it came next when the text was last here.
Texts of random tokens, in which nothing else can be known, show that (Kissane et al. 2024, arXiv
2406.17759, section 4.1):

    ... p1 p2 .. pL x ... q ... q p(L-n+1) .. pL

ends as the text did before x, over a prefix of n tokens, and the feature is read at the last one.
The texts of all lengths differ in their last L tokens alone. The null is a shuffled repeat: the
same text with everything before its last L tokens in another order, in which x does not follow pL.
All tokens are as often there; only the repeat is gone.

A curve's effect is its mean over texts less that of the shuffled ones. It is there where its 95%
interval (Student's t over texts, paired, Bonferroni over lengths) excludes 0 from above. Its half
length is the smallest n that has at least half of the largest effect: up to 2 is called
short-prefix induction, from 3 on long-prefix.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import Model
from activations.models.attention import run_with_patterns
from sae.analysis.attention.encoder import read_at
from sae.core.base import SparseAutoencoder
from sae.evaluation.intervals import t_quantile
from saescope.errors import InputError, check_range
from saescope.integers import as_index, as_indices

LENGTHS = tuple(range(1, 9))
SHORT = 2
"""the longest half length of short-prefix induction"""
_LEVEL = 0.05
_BATCH = 24
"""texts of all lengths run at once"""
_TRIES = 100
_AGREEMENT = 1e-3
"""largest relative difference of logits at which texts are read in pieces"""


@dataclass(frozen=True, kw_only=True)
class PrefixTexts:
    """Texts of random tokens that end as they did before a token, over prefixes of each length."""

    lengths: tuple[int, ...]
    tokens: NDArray[np.int64]
    """[lengths, texts, context]"""
    shuffled: NDArray[np.int64]
    """the same with the first part in another order"""
    source: NDArray[np.int64]
    """[texts], the position of the token that is to come again"""
    shuffled_source: NDArray[np.int64]
    """where it is in the shuffled ones"""


@dataclass(frozen=True, kw_only=True)
class PrefixCurve:
    """Something measured at the last token by the length of the repeated prefix."""

    lengths: tuple[int, ...]
    repeated: NDArray[np.float64]
    """[lengths, texts]"""
    shuffled: NDArray[np.float64]
    """the null: of the same texts with the repeat shuffled"""

    @property
    def effect(self) -> NDArray[np.float64]:
        """[lengths]: the mean over texts, less that of the null."""
        return (self.repeated - self.shuffled).mean(1)

    def half_width(self, level: float = 1 - _LEVEL) -> NDArray[np.float64]:
        """[lengths]: half of the effect's interval over texts."""
        difference = self.repeated - self.shuffled
        texts = difference.shape[1]
        return t_quantile(texts - 1, level) * difference.std(1, ddof=1) / texts**0.5

    @property
    def half_length(self) -> int | None:
        """The smallest length with half of the largest effect; None where there is no effect."""
        best = int(self.effect.argmax())
        if not self.effect[best] > self.half_width(1 - _LEVEL / len(self.lengths))[best]:
            return None
        return next(
            length
            for length, effect in zip(self.lengths, self.effect, strict=True)
            if 2 * effect >= self.effect[best]
        )

    @property
    def verdict(self) -> str:
        """short-prefix, long-prefix or none."""
        half = self.half_length
        return "none" if half is None else "short-prefix" if half <= SHORT else "long-prefix"


@dataclass(frozen=True, kw_only=True)
class PrefixTest:
    """What a feature does where a token comes next by induction."""

    feature: int
    next_token: int
    activation: PrefixCurve
    """of the feature, in the model's units"""
    log_prob: PrefixCurve
    """that the model gives to the next token, in nats: minus its loss"""


def prefix_texts(
    model: Model,
    next_tokens: Sequence[int],
    *,
    lengths: Sequence[int] = LENGTHS,
    context: int = 64,
    seed: int = 0,
) -> PrefixTexts:
    """A text for each token that is to come again.

    Texts begin with BOS where the model uses one. Other tokens are drawn from all but special ones,
    and in a text none is twice but for the repeat.

    Raises InputError for lengths that are not growing, or too long for the context.
    """
    lengths = tuple(as_indices(list(lengths), where="lengths", low=1))
    longest = lengths[-1] if lengths else 0
    if not lengths or list(lengths) != sorted(set(lengths)):
        raise InputError("must grow, from 1 on", where="lengths", given=list(lengths))
    first = [] if model.bos_token_id is None else [model.bos_token_id]
    opening = context - longest - len(first)
    if opening < 2 * (longest + 1) or (model.n_ctx is not None and context > model.n_ctx):
        least = 3 * longest + 2 + len(first)
        raise InputError(
            "is no context for these lengths",
            where="context",
            given=context,
            allowed=f"{least} to {model.n_ctx or 'any'}",
        )
    known = np.array([t for t in range(model.d_vocab) if t not in model.special_token_ids])
    if len(known) <= context:
        raise InputError(
            "has too few tokens for texts in which none is twice",
            where=model.spec,
            given=f"{len(known)} that are not special",
            allowed=f"more than {context}",
        )
    draw = np.random.default_rng(seed)
    texts, shuffled, source, shuffled_source = [], [], [], []
    for following in as_indices(list(next_tokens), where="next_tokens", high=model.d_vocab - 1):
        others = draw.choice(known[known != following], opening - 1 + longest, replace=False)
        at = int(draw.integers(longest, opening))
        start = np.insert(others[: opening - 1], at, following)
        prefix, filler = start[at - longest : at], others[opening - 1 :]
        ends = [np.concatenate([filler[n:], prefix[longest - n :]]) for n in lengths]
        mixed = _shuffled(draw, start, int(prefix[-1]), following)
        texts.append([[*first, *start, *end] for end in ends])
        shuffled.append([[*first, *mixed, *end] for end in ends])
        source.append(at + len(first))
        shuffled_source.append(int((mixed == following).argmax()) + len(first))
    return PrefixTexts(
        lengths=lengths,
        tokens=np.array(texts, dtype=np.int64).swapaxes(0, 1),
        shuffled=np.array(shuffled, dtype=np.int64).swapaxes(0, 1),
        source=np.array(source),
        shuffled_source=np.array(shuffled_source),
    )


def _shuffled(
    draw: np.random.Generator, start: NDArray[np.int64], before: int, following: int
) -> NDArray[np.int64]:
    """Another order, in which one token does not stand before another."""
    for _ in range(_TRIES):
        mixed = draw.permutation(start)
        if int(mixed[(mixed == following).argmax() - 1]) != before or mixed[0] == following:
            return mixed
    raise AssertionError("chance has it that two tokens stand side by side a hundred times")


def prefix_test(
    model: Model,
    sae: SparseAutoencoder,
    feature: int,
    next_token: int,
    *,
    lengths: Sequence[int] = LENGTHS,
    texts: int = 24,
    context: int = 64,
    seed: int = 0,
    site: str | None = None,
    allow_other_model: bool = False,
) -> PrefixTest:
    """How a feature depends on the length of a repeat after which a token came before.

    Args:
        next_token: the token that the repeat announces; induction features are of one token or of
            few, and what its heads read where it fires tells which (`FeatureSources.token`).
        texts: of random tokens, each with every length and shuffled; `context` tokens each.
        site, allow_other_model: as `attribute`'s.

    Raises InputError for an SAE at another site than the heads' or the residual stream, and as
    `prefix_texts` does.

    >>> found = prefix_test(model, sae, 123, model.tokenize(" river")[-1])     # doctest: +SKIP
    >>> found.activation.half_length, found.activation.verdict                 # doctest: +SKIP
    (3, 'long-prefix')
    """
    [found] = prefix_tests(
        model,
        sae,
        [feature],
        next_token,
        lengths=lengths,
        texts=texts,
        context=context,
        seed=seed,
        site=site,
        allow_other_model=allow_other_model,
    )
    return found


@torch.inference_mode()
def prefix_tests(
    model: Model,
    sae: SparseAutoencoder,
    features: Sequence[int],
    next_token: int,
    *,
    lengths: Sequence[int] = LENGTHS,
    texts: int = 24,
    context: int = 64,
    seed: int = 0,
    site: str | None = None,
    allow_other_model: bool = False,
) -> list[PrefixTest]:
    """`prefix_test` of several features, read in the same texts before one token.

    The beginning that texts of all lengths share is run once, if the model goes on from a cache of
    keys and values as it reads a whole text.
    """
    check_range("texts", texts, low=2)
    own, read, _, _ = read_at(model, sae, site, allow_other_model)
    chosen = as_indices(list(features), where="feature", low=0, high=own.d_sae - 1)
    made = prefix_texts(model, [next_token] * texts, lengths=lengths, context=context, seed=seed)
    shared = context - made.lengths[-1]
    run = _run_ends if _goes_on(model, torch.from_numpy(made.tokens[0, :1]), shared) else _run
    found = {}
    for name, tokens in (("repeated", made.tokens), ("shuffled", made.shuffled)):
        by_text = torch.from_numpy(tokens).swapaxes(0, 1)
        each_run = max(1, _BATCH // len(made.lengths))
        pieces = [
            _last(model, own, read, part, lambda some: run(model, some, shared), next_token)
            for part in by_text.split(each_run)
        ]
        codes, log_prob = (
            torch.cat(several).swapaxes(0, 1) for several in zip(*pieces, strict=True)
        )
        found[name] = codes[..., chosen].numpy(), log_prob.numpy()
    curves = [
        {name: codes[..., n] for name, (codes, _) in found.items()} for n in range(len(chosen))
    ]
    log_prob = PrefixCurve(lengths=made.lengths, **{name: x for name, (_, x) in found.items()})
    return [
        PrefixTest(
            feature=number,
            next_token=next_token,
            activation=PrefixCurve(lengths=made.lengths, **curve),
            log_prob=log_prob,
        )
        for number, curve in zip(chosen, curves, strict=True)
    ]


Run = Callable[[Tensor], Tensor]
"""from texts [n, lengths, context] to their last logits [n * lengths, d_vocab]"""


def _last(
    model: Model, sae: SparseAutoencoder, site: str, tokens: Tensor, run: Run, following: int
) -> tuple[Tensor, Tensor]:
    """At the last token of each text: activations [n, lengths, d_sae], and the log-probability of
    what follows [n, lengths]."""
    seen: list[Tensor] = []

    def see(x: Tensor, position: Tensor) -> None:
        del position
        seen[:] = [x[:, -1]]  # of several passes the last one is over the texts' ends

    with model.edit({site: see}):
        logits = run(tokens)
    (x,) = seen
    codes = sae.encode_sparse(x.to(sae.W_dec)).dense()
    log_prob = logits.double().log_softmax(-1)[:, following]
    shape = tokens.shape[:2]
    return codes.double().cpu().unflatten(0, shape), log_prob.cpu().unflatten(0, shape)


def _run(model: Model, tokens: Tensor, shared: int) -> Tensor:
    """Last logits of texts [n, lengths, context], each read as a whole."""
    del shared
    return model.logits(tokens.flatten(0, 1))[:, -1]


def _run_ends(model: Model, tokens: Tensor, shared: int) -> Tensor:
    """Last logits of texts [n, lengths, context] that have so many tokens in common at all lengths:
    these are read once, and each end goes on from their keys and values."""
    tokens = tokens.to(model.device)
    cache = model.hf.base_model(input_ids=tokens[:, 0, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(tokens.shape[1])
    ends = tokens[..., shared:].flatten(0, 1)
    return model.hf(input_ids=ends, past_key_values=cache, use_cache=True).logits[:, -1]


def _goes_on(model: Model, tokens: Tensor, shared: int) -> bool:
    """Whether a text [1, context] read in two pieces ends as it does when read as a whole.

    Tried, as some models keep no keys and values, or keep them otherwise.
    """
    plain = _run(model, tokens[None], shared)
    try:
        found = _run_ends(model, tokens[None], shared)
    except Exception:  # whatever the model's own code makes of it
        return False
    same = found.shape == plain.shape
    return same and bool((found - plain).norm() <= _AGREEMENT * plain.norm())


@torch.inference_mode()
def prefix_attention(
    model: Model,
    layer: int,
    *,
    lengths: Sequence[int] = LENGTHS,
    texts: int = 8,
    context: int = 64,
    seed: int = 0,
) -> list[PrefixCurve]:
    """How strongly each head of a layer attends, from the end of a repeat, to what came next.

    The token that came next is another one in each text. A curve a head.

    Raises InputError for a layer that is not there, and as `prefix_texts` does.
    """
    layer = as_index(layer, where="layer", low=0, high=model.n_layers - 1)
    check_range("texts", texts, low=2)
    draw = np.random.default_rng(seed)
    known = [t for t in range(model.d_vocab) if t not in model.special_token_ids]
    chosen = draw.choice(known, texts).tolist()
    made = prefix_texts(model, chosen, lengths=lengths, context=context, seed=seed)
    found = [
        np.array([list(_attended(model, layer, row, source)) for row in tokens])
        for tokens, source in ((made.tokens, made.source), (made.shuffled, made.shuffled_source))
    ]
    repeated, shuffled = found
    return [
        PrefixCurve(
            lengths=made.lengths, repeated=repeated[..., head], shuffled=shuffled[..., head]
        )
        for head in range(repeated.shape[-1])
    ]


def _attended(
    model: Model, layer: int, rows: NDArray[np.int64], source: NDArray[np.int64]
) -> Iterator[NDArray[np.float64]]:
    """Of each text the weight [heads] of its source at its last token."""
    site = f"blocks.{layer}.attn.hook_z"
    for number, (tokens, at) in enumerate(zip(rows.tolist(), source.tolist(), strict=True)):
        run = run_with_patterns(model, tokens, [site], check=number == 0)
        yield run.pattern[layer][:, -1, at].numpy()
