"""Temporal feature analysis (Lubana et al. 2025, arXiv 2511.01836): what a text's past predicts of
an activation, and the features of what is new.

With D = W_dec [d_sae, d_in], E the encoder (D^T where tied) and lambda = 1 / (4 d_in), layer by
layer, r_t = x_t - b at first:

    z_t = relu(lambda r_t E)                     codes of what is left
    p_t = relu(attention(z_t; 0, z_0, ..., z_{t-1}))     the past, a zero in front, asked by z_t
    s_t = <p_t D, r_t> / (||p_t D|| + 1e-6)^2    how much of it there is
    predicted += s_t p_t        r_t -= s_t p_t D
    novel = topk(relu(lambda r_t E))             of what is left at the end
    x_hat = (novel + predicted) D + b

So codes of a token depend on all tokens before it, and such an SAE reads sequences, not rows: it is
no `SparseAutoencoder`, and cannot be indexed, steered with or trained here. b is b_dec where the
files say that it is taken off the input; it is added at the end there, and where E is not tied.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from saescope.errors import InputError

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class PredictiveConfig:
    """The shape and the options of one, by the names of SAELens."""

    d_in: int
    d_sae: int
    n_heads: int = 8
    n_attn_layers: int = 1
    bottleneck_factor: int = 64
    kval_topk: int | None = None
    """novel features a token; None keeps all that are above 0"""
    tied_weights: bool = True
    apply_b_dec_to_input: bool = True
    scale: float = 1.0
    """what activations are multiplied by"""

    def __post_init__(self) -> None:
        if self.d_sae % (self.bottleneck_factor * self.n_heads):
            raise InputError(
                "is no multiple of bottleneck_factor * n_heads",
                where="d_sae",
                given=self.d_sae,
                allowed=f"multiples of {self.bottleneck_factor * self.n_heads}",
            )


class PredictiveOutput(NamedTuple):
    """What a sequence's activations are made of; all in the model's units but for the codes."""

    novel: Float[Tensor, "batch pos d_sae"]
    """features of what is new at a token, sparse"""
    predicted: Float[Tensor, "batch pos d_sae"]
    """features of what the tokens before it predict, dense"""
    x_predicted: Float[Tensor, "batch pos d_in"]
    """what they write, without the bias"""
    x_hat: Float[Tensor, "batch pos d_in"]
    """the reconstruction"""


class _Attention(nn.Module):
    def __init__(self, config: PredictiveConfig) -> None:
        super().__init__()
        self.heads = config.n_heads
        narrow = config.d_sae // config.bottleneck_factor
        self.k_ctx = nn.Linear(config.d_sae, narrow)
        self.q_target = nn.Linear(config.d_sae, narrow)
        self.v_ctx = nn.Linear(config.d_sae, config.d_sae)
        self.c_proj = nn.Linear(config.d_sae, config.d_sae)

    def forward(self, context: Tensor, asking: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q_target(asking), self.k_ctx(context), self.v_ctx(context))
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class PredictiveSAE(nn.Module):
    """A temporal SAE of SAELens, for reading; see the module's text and `sae.load_predictive`."""

    def __init__(self, config: PredictiveConfig) -> None:
        super().__init__()
        self.config = config
        self.metadata: dict[str, Any] = {}
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        if not config.tied_weights:
            self.W_enc = nn.Parameter(torch.empty(config.d_in, config.d_sae))
        self.attn_layers = nn.ModuleList(_Attention(config) for _ in range(config.n_attn_layers))

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "batch pos d_in"]) -> PredictiveOutput:
        """Take sequences apart. Their first position must be that of the text: the past counts.

        Raises InputError for another shape.
        """
        config = self.config
        if x.ndim != 3 or x.shape[-1] != config.d_in:
            raise InputError(
                "reads sequences of activations",
                where="x",
                given=tuple(x.shape),
                allowed=f"[batch, pos, {config.d_in}]",
            )
        encoder = self.W_dec.T if config.tied_weights else self.W_enc
        encoder = encoder / (4 * config.d_in)
        rest = x.to(self.W_dec) * config.scale
        rest = rest - self.b_dec if config.apply_b_dec_to_input else rest
        predicted = rest.new_zeros(*x.shape[:2], config.d_sae)
        for attention in self.attn_layers:
            z = (rest @ encoder).relu()
            past = functional.pad(z[:, :-1], (0, 0, 1, 0))
            p = attention(past, z).relu()
            written = p @ self.W_dec
            length = written.norm(dim=-1, keepdim=True) + _EPSILON
            amount = (written * rest).sum(-1, keepdim=True) / length.square()
            predicted = predicted + p * amount
            rest = rest - amount * written
        novel = (rest @ encoder).relu()
        if config.kval_topk is not None:
            top = novel.topk(config.kval_topk, dim=-1)
            novel = torch.zeros_like(novel).scatter_(-1, top.indices, top.values)
        x_hat = (novel + predicted) @ self.W_dec
        if config.apply_b_dec_to_input or not config.tied_weights:
            x_hat = x_hat + self.b_dec
        return PredictiveOutput(
            novel, predicted, predicted @ self.W_dec / config.scale, x_hat / config.scale
        )
