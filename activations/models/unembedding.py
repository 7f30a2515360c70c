"""A model's head: from the last block's residual stream to logits, differentiable."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from activations.models.language import Model
from activations.sites.hf_facts import final_norm, logits_factor, unembedding_matrix
from saescope.errors import InputError

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


class Head:
    """The model's own final norm and unembedding (and soft cap, where it has one) in float32.

    Made only if it gives the model's logits from the model's last residual stream: InputError for
    an architecture that does more than this.

    >>> head = Head(model)  # doctest: +SKIP
    >>> logits = head(model.capture(tokens, [head.site])[head.site])  # doctest: +SKIP
    """

    def __init__(self, model: Model) -> None:
        self.site = f"blocks.{model.n_layers - 1}.hook_resid_post"
        """the last block's residual stream"""
        # the capture's own way to find modules: the adapter's component names
        norm = final_norm(model.hf, model._sites.adapter)
        self._norm = torch.nn.Identity() if norm is None else copy.deepcopy(norm).float()
        bias = getattr(model.hf.get_output_embeddings(), "bias", None)
        self._weight = unembedding_matrix(model.hf).T
        self._bias = None if bias is None else bias.detach().float() * logits_factor(model.hf)
        self._cap = getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)
        self._check(model)

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Next-token logits of residual streams behind the last block, float32."""
        logits = functional.linear(self._norm(x.float()), self._weight, self._bias)
        return logits if self._cap is None else self._cap * (logits / self._cap).tanh()

    @torch.no_grad()
    def _check(self, model: Model) -> None:
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
