"""Whether a model, or a store, is the one that an SAE belongs to: by hashes, not by names."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from sae.core.base import SparseAutoencoder
from sae.data.placement import placement_of
from saescope.errors import ArtefactError, InputError
from saescope.progress import say

if TYPE_CHECKING:
    from activations import Model

_COMPARED = {"weights_hash": "weights", "tokenizer_hash": "tokenizer"}
"""what an SAE's metadata says of the model it was trained on, and a word for it"""


def differing(sae: SparseAutoencoder, found: Mapping[str, Any]) -> list[str]:
    """What of a model, given by the names of its hashes, is not as the SAE was trained on.

    None of what the SAE, or `found`, does not say: SAEs of other libraries name no hashes.
    """
    known = {name: sae.metadata.get(name) for name in _COMPARED}
    return [
        word
        for name, word in _COMPARED.items()
        if known[name] and found.get(name) and known[name] != found[name]
    ]


def check_trained_on(
    model: "Model", sae: SparseAutoencoder, *, where: str, allow_other_model: bool = False
) -> None:
    """Raise InputError if an SAE was trained on another model's activations than this one's.

    Args: allow_other_model uses it all the same, and says so (on purpose, say an SAE of a base
    model on what was fine-tuned from it).
    """
    if not any(sae.metadata.get(name) for name in _COMPARED):
        return
    found = {name: getattr(model, name, None) for name in _COMPARED}
    refuse_other(sae, differing(sae, found), model.spec, where, allow_other_model)


def refuse_other(
    sae: SparseAutoencoder, words: list[str], given: str, where: str, allow_other_model: bool
) -> None:
    """Raise InputError for what differs, or, if it is allowed, say so."""
    if not words:
        return
    own = sae.metadata.get("model_spec") or sae.metadata.get("model")
    what = f"the SAE was trained on another model: its {' and '.join(words)} differ"
    if not allow_other_model:
        raise InputError(
            f"{what}; allow_other_model uses it all the same",
            where=where,
            given=given,
            allowed=str(own),
        )
    say(f"{where}: {what}, and it is used all the same (SAE of {own}, model {given})")


def weights_hash(sae: SparseAutoencoder) -> str:
    """sha256 over an SAE's parameters, which decide what its features are."""
    digest = hashlib.sha256()
    for name, value in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_indexed(sae: SparseAutoencoder, meta: Mapping[str, Any], *, where: str) -> None:
    """Raise ArtefactError unless a feature store, by its meta values, is about this very SAE.

    The SAE in the folder that a store names may have been trained anew since.
    """
    own = sae.transcodes or sae.concatenates
    site = None if own else meta.get("site")
    found = weights_hash(placement_of(sae, site, behind_lens=True).sae)
    if found != meta.get("sae_hash"):
        raise ArtefactError(
            "is about another SAE than the one that is now in its folder; index it anew",
            where=where,
            given=f"{meta.get('sae_path')}: {found[:12]}",
            allowed=str(meta.get("sae_hash"))[:12],
        )
