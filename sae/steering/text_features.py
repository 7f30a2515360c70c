"""The features that fire on a text, for the explorer and notebooks."""

from dataclasses import dataclass

import numpy as np
import torch

from activations import Model
from sae.core.base import SparseAutoencoder
from sae.data.model_placement import placement_in
from saescope.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """Activations of one text, as parallel arrays of entries in the order of positions."""

    token_ids: list[int]
    """token at each position"""
    tokens: list[str]
    """its displayable text"""
    keep: list[bool]
    """false where SAEs are not trained (position 0, special tokens); no entries there"""
    position: np.ndarray
    """int32 [entries]"""
    feature: np.ndarray
    """int32 [entries]"""
    activation: np.ndarray
    """float32 [entries], in the model's units"""


@torch.inference_mode()
def features_of_text(
    model: Model,
    sae: SparseAutoencoder,
    text: str,
    *,
    site: str | None = None,
    allow_other_model: bool = False,
) -> TextFeatures:
    """The features that fire on each token of a text.

    Args: site is where, if not the site the SAE was trained at; which layer, for one of several.
    allow_other_model: read a model with an SAE that was trained on another; it is said.

    Raises InputError if the text is empty or longer than the model's context, or the SAE does not
    fit the model.
    """
    ids = model.tokenize(text)
    if not text or not ids:
        raise InputError("the text is empty", where="features_of_text", given=text)
    if model.n_ctx is not None and len(ids) > model.n_ctx:
        raise InputError(
            "the text is longer than the model's context",
            where="features_of_text",
            given=f"{len(ids)} tokens",
            allowed=f"up to {model.n_ctx}",
        )
    placement = placement_in(model, sae, site, allow_other_model=allow_other_model)
    tokens = torch.tensor([ids])
    captured = model.capture(tokens, placement.read)
    activation = torch.cat([captured[name][0].float() for name in placement.read], dim=-1)
    keep = model.keep_mask(tokens)[0]
    codes = placement.sae.encode_sparse(activation[keep]).compact()
    at = keep.nonzero()[:, 0][codes.rows()]
    return TextFeatures(
        token_ids=list(ids),
        tokens=model.token_strings(ids),
        keep=keep.tolist(),
        position=at.numpy().astype(np.int32),
        feature=codes.index.numpy().astype(np.int32),
        activation=codes.value.float().numpy(),
    )
