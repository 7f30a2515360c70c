"""A model's unembedding: from the last block's residual stream to logits, differentiable."""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from activations.sites.hf_facts import final_norm, logits_factor, unembedding_matrix
from saescope.errors import InputError

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


class _Model(Protocol):
    """What is asked of a language model here."""

    hf: Any
    spec: str
    dtype: torch.dtype
    n_layers: int
    d_model: int
    n_ctx: int | None
    d_vocab: int
    adapter: Any

    def logits(self, tokens: Tensor) -> Tensor: ...

    def capture(self, tokens: Tensor, sites: Sequence[str]) -> dict[str, Tensor]: ...


class Unembedding:
    """The model's own final norm and unembedding (and soft cap, where it has one) in float32.

    Made only if it gives the model's logits from the model's last residual stream: InputError for
    an architecture that does more than this.

    >>> unembed = Unembedding(model)  # doctest: +SKIP
    >>> logits = unembed(model.capture(tokens, [unembed.site])[unembed.site])  # doctest: +SKIP
    """

    def __init__(self, model: _Model) -> None:
        self.site = f"blocks.{model.n_layers - 1}.hook_resid_post"
        """the last block's residual stream"""
        norm = final_norm(model.hf, model.adapter)
        self.norm = torch.nn.Identity() if norm is None else copy.deepcopy(norm).float()
        bias = getattr(model.hf.get_output_embeddings(), "bias", None)
        self._weight = unembedding_matrix(model.hf).T
        self._bias = None if bias is None else bias.detach().float() * logits_factor(model.hf)
        self._cap = getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)
        self._check(model)

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Next-token logits of residual streams behind the last block, float32."""
        logits = functional.linear(self.norm(x.float()), self._weight, self._bias)
        return logits if self._cap is None else self._cap * (logits / self._cap).tanh()

    @torch.no_grad()
    def _check(self, model: _Model) -> None:
        tokens = torch.arange(min(8, model.d_vocab, model.n_ctx or 8))[None]
        expected = model.logits(tokens).float()
        found = self(model.capture(tokens, [self.site])[self.site])
        error = float((found - expected).norm() / expected.norm())
        if not error <= _TOLERANCE.get(model.dtype, 0.05):
            raise InputError(
                "this model's logits are not its final norm and unembedding alone",
                where=model.spec,
                given=f"relative difference {error:.3g}",
            )


def unembedding_and_scale(model: _Model) -> tuple[Tensor, Tensor | None]:
    """W_U [d_model, d_vocab] in float32, and the final norm's scale [d_model] if it has one.

    Raises InputError for a model whose logits are not these two alone.
    """
    Unembedding(model)  # compares them with the model's own logits
    w_u = unembedding_matrix(model.hf)
    weight: Any = getattr(final_norm(model.hf, model.adapter), "weight", None)
    if weight is None:
        return w_u, None
    offset = 1.0 if getattr(model.adapter.cfg, "rmsnorm_uses_offset", False) else 0.0
    return w_u, weight.detach().float() + offset


def final_norm_centres(model: _Model) -> bool:
    """Whether the final norm takes a vector's mean off it: a LayerNorm does, an RMSNorm not.

    Asked of the norm itself, by moving a vector along the direction that centring takes off.
    """
    norm = model.hf.get_submodule(model.adapter.get_component_mapping()["ln_final"].name)
    x = torch.linspace(-1, 2, model.d_model).square()
    like = next(norm.parameters(), model.hf.get_output_embeddings().weight)
    with torch.inference_mode():
        still, moved = norm(torch.stack([x, x + 1]).to(like)).float()
    return bool((moved - still).norm() < 0.05 * still.norm())
