"""The model that a command runs: the one given, or the one that an SAE was trained on."""

from pathlib import Path

from activations import Model, load_model
from activations.models.names import hub_name
from activations.models.packaged import PACKAGED_MODELS
from sae.core.base import SparseAutoencoder
from saescope.errors import InputError


def model_of(
    sae: SparseAutoencoder, given: str | None, *, where: str, trust_remote_code: bool
) -> Model:
    """The model given, or the one that the SAE's files name; InputError if there is none.

    Args: where is what the SAE was read from.
    """
    trust = trust_remote_code
    if given is not None:
        return load_model(given, trust_remote_code=trust)
    spec = sae.metadata.get("model_spec")
    if spec is not None:
        revision = sae.metadata.get("model_revision")
        return load_model(spec, revision=revision, trust_remote_code=trust)
    named = sae.metadata.get("model")
    if named is None:
        raise InputError("this SAE does not name its model; give --model", where=where)
    try:
        here = named in PACKAGED_MODELS or Path(named).expanduser().is_dir()
        return load_model(named if here else hub_name(named), trust_remote_code=trust)
    except InputError as error:
        raise InputError(
            f"the model that this SAE names cannot be had; give --model ({error})", where=where
        ) from error
