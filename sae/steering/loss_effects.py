"""What a text's features do to the prediction of the next token, to first order."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from activations import Model
from sae.core.base import SparseAutoencoder
from sae.data.model_placement import placement_in
from sae.steering.text_features import TextFeatures
from saescope.errors import InputError

LONGEST = 64
"""tokens of a text: each is another pass through the model, forward and back"""
_PASSES = 8
"""positions computed at once"""


def loss_effects(
    model: Model,
    sae: SparseAutoencoder,
    found: TextFeatures,
    *,
    site: str | None = None,
    allow_other_model: bool = False,
) -> np.ndarray:
    """How much the loss of the next token would rise if a feature were ablated at a token.

    The loss is cross-entropy, in nats. To first order ablation, which takes activation * W_dec
    [feature] away from one position, changes it by minus the product of that vector and the
    gradient of that one loss at that position (attribution patching: Syed, Rager, Conmy 2023,
    section 2). Positive: the feature helps to predict the token that follows.

    Returns float32 [entries], for `found`'s entries; NaN at the last token, which none follows.

    Raises InputError for a crosscoder, or a text of more than 64 tokens.
    """
    count = len(found.token_ids)
    if count > LONGEST:
        raise InputError(
            "effects on the loss take one pass through the model for each token",
            where="loss_effects",
            given=f"{count} tokens",
            allowed=f"up to {LONGEST}",
        )
    placement = placement_in(
        model, sae, site, where="loss_effects", allow_other_model=allow_other_model
    )
    (written,) = placement.written
    effects = np.full(len(found.feature), np.nan, dtype=np.float32)
    tokens = torch.tensor([found.token_ids])
    positions = sorted({int(p) for p in found.position if p < count - 1})
    for first in range(0, len(positions), _PASSES):
        chosen = positions[first : first + _PASSES]
        gradients = _gradients(model, written, tokens, chosen)
        for position, gradient in zip(chosen, gradients, strict=True):
            mine = np.flatnonzero(found.position == position)
            directions = placement.sae.W_dec[torch.from_numpy(found.feature[mine]).long()]
            slopes = (directions.detach().float() @ gradient.to(directions.device)).cpu().numpy()
            effects[mine] = -found.activation[mine] * slopes
    return effects


def _gradients(model: Model, site: str, tokens: Tensor, positions: list[int]) -> list[Tensor]:
    """Of each position's own loss, the gradient [d] at that position of a site."""
    until = max(positions) + 1
    batch = tokens[:, :until].expand(len(positions), -1)
    nudge: list[Tensor] = []

    def add_nothing(h: Tensor, position: Tensor) -> Tensor:
        del position
        nudge[:] = [torch.zeros_like(h, requires_grad=True)]
        return h + nudge[0]

    with torch.enable_grad(), model.edit({site: add_nothing}):
        logits = model.logits(batch, gradient=True)
        rows, at = torch.arange(len(positions)), torch.tensor(positions)
        wanted = tokens[0, at + 1].to(logits.device)
        loss = cross_entropy(logits[rows, at].float(), wanted, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, nudge)
    return list(gradient[rows, at].float())
