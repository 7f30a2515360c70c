"""Our SAEs from plain weights, as other libraries' files hold them."""

from dataclasses import fields
from typing import Any

import torch

from sae.architectures import architecture
from sae.core.base import SparseAutoencoder
from sae.core.normaliser import Normaliser
from sae.core.plain import PlainSAE
from saescope.errors import InputError


@torch.no_grad()
def sae_of(plain: PlainSAE) -> SparseAutoencoder:
    """Our SAE with these weights, in evaluation mode, on the CPU.

    It is of the architecture that its rule is named after; a transcoder's rule is an option there.
    """
    options: dict[str, Any] = {"d_sae": plain.d_sae}
    kind: str = plain.activation
    if plain.transcoder:
        kind = "transcoder" if plain.W_skip is None else "skip_transcoder"
        options["activation"] = plain.activation
    if plain.k is not None:
        options["k"] = plain.k
    cls = architecture(kind)
    if plain.pursuit is not None:
        options |= _stopping(plain.pursuit, cls)
    plain = plain.with_pre_bias(cls.pre_bias)
    sae = cls(cls.Config(**options), plain.d_in, plain.W_dec.shape[1])
    put(sae, plain)
    if plain.standardised:
        identity = Normaliser.identity(plain.d_in)
        sae.normaliser = Normaliser("standardised", identity.mean, identity.scale, 1.0)
    return sae.eval()


def _stopping(pursuit: dict[str, Any], cls: type[SparseAutoencoder]) -> dict[str, Any]:
    rules = {name: value for name, value in pursuit.items() if value}
    unknown = sorted(set(rules) - {field.name for field in fields(cls.Config)})
    if unknown:
        raise InputError(
            "matching pursuit that stops a row by a rule which saescope's has not",
            where="matching_pursuit",
            given={name: rules[name] for name in unknown},
            allowed="a number of steps",
        )
    return rules


def put(sae: SparseAutoencoder, plain: PlainSAE) -> None:
    """Copy plain weights into an SAE; InputError for a tensor that it has no parameter for."""
    tensors = plain.tensors()
    state = sae.state_dict()
    if "W_enc" in tensors:
        tensors["W_enc_T"] = tensors.pop("W_enc").T
    missing = sorted(set(tensors) - set(state))
    if missing:
        raise InputError("has no parameters for these weights", where="sae", given=missing)
    for name, value in tensors.items():
        state[name].copy_(value.reshape(state[name].shape))
