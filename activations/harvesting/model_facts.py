"""What a harvest's manifest says of its model, and whether a model is that one."""

from typing import Any

from activations.models.base import RawModel
from activations.models.language import Model
from activations.storage.reader import ActivationStore
from saescope.errors import InputError


def facts_of(model: Model | RawModel) -> dict[str, Any]:
    """What a harvest's manifest says of its model."""
    if isinstance(model, RawModel):
        return model.facts()
    return {
        "name": model.name,
        "kind": "language",
        "spec": model.spec,
        "revision": model.revision,
        "weights_hash": model.weights_hash,
        "tokenizer_hash": model.tokenizer_hash,
        "dtype": model.dtype_name,
        "products": model.products,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "special_token_ids": sorted(model.special_token_ids),
        **({"code_hash": model.code_hash} if model.code_hash else {}),
        "n_ctx": model.n_ctx,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "d_vocab": model.d_vocab,
    }


def check_same_model(model: Model | RawModel, begun: ActivationStore) -> None:
    """Raise InputError unless a harvest is of this very model, with the same inputs."""
    facts = begun.manifest["model"]
    for name in ("weights_hash", "tokenizer_hash", "inputs_hash", "code_hash"):
        if name in facts and getattr(model, name) != facts[name]:
            raise InputError(
                f"the model is not the one this harvest began with ({name} differs)",
                where=str(begun.path),
            )
