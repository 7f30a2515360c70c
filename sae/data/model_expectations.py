"""What a foreign SAE's files say of the model that it is for, against the model in use.

Models here are as their files have them, and their tokenizers put a BOS in front or do not. An SAE
trained on activations of a model whose weights TransformerLens had processed, or on text that began
otherwise, sees other activations here than it was made for: that is a warning, since its files may
say so of a site that is hardly changed by it.
"""

import re
import warnings

from sae.core.base import SparseAutoencoder

_STREAM = r"(?:.*\.)?hook_(?:resid_\w+|embed|pos_embed|attn_out|mlp_out)"
_CHANGED = {
    "center_writing_weights": (
        rf"{_STREAM}|.*\.(?:attn|mlp)\.hook_out|.*\.hook_result",
        "the mean over the width is taken off where norms are LayerNorm (center_writing_weights)",
    ),
    "fold_ln": (
        r"(?:.*\.)?ln\w*\.hook_\w+|.*\.(?:attn|mlp)\.hook_in",
        "norms have no gain and bias of their own (fold_ln)",
    ),
    "fold_value_biases": (
        r".*\.attn\.hook_[vz]",
        "values have no bias (fold_value_biases)",
    ),
    "refactor_factored_attn_matrices": (
        r".*\.attn\.hook_[qkvz]",
        "attention's matrices are multiplied anew (refactor_factored_attn_matrices)",
    ),
}
"""What changes which sites (TransformerLens, HookedTransformer.from_pretrained), and how"""


def changes_of(sae: SparseAutoencoder, *, layer_norm: bool = True) -> list[str]:
    """In what ways the activations an SAE is for differ from an unprocessed model's, in words.

    Args: layer_norm is whether the model's norms take the mean off, without which TransformerLens
    centres no weights.
    """
    sites = [sae.metadata[name] for name in ("site", "target_site") if sae.metadata.get(name)]
    found = []
    for name in sae.metadata.get("processing", ()):
        pattern, words = _CHANGED[name]
        centred_in_vain = name == "center_writing_weights" and not layer_norm
        here = not sites or any(re.fullmatch(pattern, site) for site in sites)
        if here and not centred_in_vain:
            found.append(words)
    return found


def warn_at_load(sae: SparseAutoencoder) -> None:
    """Warn if an SAE's files ask for a model whose weights are processed so that its sites change.

    What follows from the age of the files alone is left until a model is known.
    """
    asked = sae.metadata.get("saelens", {}).get("model_from_pretrained_kwargs")
    if asked:
        _warn("this SAE", changes_of(sae))


def warn_of_model(
    sae: SparseAutoencoder, *, where: str, has_bos: bool, layer_norm: bool = True
) -> None:
    """Warn if an SAE was trained on another kind of activations than a model or harvest gives.

    Args:
        where: which model or harvest.
        has_bos: whether sequences begin with a BOS there.
        layer_norm: whether its norms take the mean off.
    """
    _warn(f"{where}: the SAE", changes_of(sae, layer_norm=layer_norm))
    wanted = sae.metadata.get("prepend_bos")
    if wanted is None or bool(wanted) == has_bos:
        return
    this, that = ("with", "without") if wanted else ("without", "with")
    warnings.warn(
        f"{where}: sequences begin {that} a BOS, and the SAE was trained on sequences that begin "
        f"{this} one: activations, above all of the first tokens, are not what it was made for",
        stacklevel=4,
    )


def _warn(what: str, changes: list[str]) -> None:
    if changes:
        warnings.warn(
            f"{what} was trained on activations of a model whose weights TransformerLens had "
            f"processed: {'; '.join(changes)}. Models are not processed here, so its features and "
            "FVU are not what they were; certify it on the activations in use (sae.load with "
            "reference, saescope convert with --harvest)",
            stacklevel=4,
        )
