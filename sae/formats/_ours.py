"""Between our architectures and plain weights."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sae.architectures import architecture
from sae.core.base import SparseAutoencoder, kind_of
from sae.core.normaliser import Normaliser
from sae.formats._plain import PlainSAE
from saescope.errors import InputError

Rule = Callable[[Any], dict[str, Any]]


def _bias(sae: Any) -> dict[str, Any]:
    return {"b_enc": sae.b_enc}


def _topk(sae: Any) -> dict[str, Any]:
    return {"activation": "topk", "k": int(sae.config.k), **_bias(sae)}


def _abstopk(sae: Any) -> dict[str, Any]:
    return {**_topk(sae), "activation": "abstopk"}


def _gated(sae: Any) -> dict[str, Any]:
    return {
        "activation": "gated",
        "b_gate": sae.b_gate,
        "b_mag": sae.b_mag,
        "r_mag": sae.r_mag.expand(sae.d_sae),
    }


def _relu(sae: Any) -> dict[str, Any]:
    return {"activation": "relu", **_bias(sae)}


def _batch_level(sae: Any) -> dict[str, Any]:
    """Features fire where they pass the stored threshold, one for all or one each."""
    threshold = sae.threshold.detach().float().clamp_min(0)
    return {"activation": "jumprelu", "threshold": threshold.expand(sae.d_sae), **_bias(sae)}


def _jumprelu(sae: Any) -> dict[str, Any]:
    return {"activation": "jumprelu", "threshold": sae.theta.detach().float(), **_bias(sae)}


def _transcoder(sae: Any) -> dict[str, Any]:
    parts = {"activation": sae.config.activation, "transcoder": True, **_bias(sae)}
    if sae.config.activation == "topk":
        parts["k"] = int(sae.config.k)
    if sae.config.activation == "jumprelu":
        parts["threshold"] = sae.threshold.clamp_min(0)
    if kind_of(sae.config) == "skip_transcoder":
        parts["W_skip"] = sae.W_skip
    return parts


def _pursuit(sae: Any) -> dict[str, Any]:
    if sae.config.orthogonal or not sae.config.repeats:
        raise InputError(
            "orthogonal pursuit, or one without repeats, has no plain form",
            where="sae",
            given={"orthogonal": sae.config.orthogonal, "repeats": sae.config.repeats},
        )
    rules = {name: getattr(sae.config, name) for name in STOPPING if hasattr(sae.config, name)}
    return {"activation": "matching_pursuit", "pursuit": {"k": int(sae.config.k), **rules}}


STOPPING = ("residual_threshold", "stop_on_duplicate")
"""rules that end a pursuit before its k steps; 0 and false where there are none"""
TOPK = ("topk", "csr", "msae", "archetypal")
THRESHOLDS = ("jumprelu", "batchtopk", "mutual_choice", "matryoshka", "feature_choice")
TRANSCODERS = ("transcoder", "skip_transcoder")

RULES: dict[str, Rule] = {
    "relu": _relu,
    "gated": _gated,
    **dict.fromkeys(TOPK, _topk),
    "abstopk": _abstopk,
    "jumprelu": _jumprelu,
    **dict.fromkeys(THRESHOLDS[1:], _batch_level),
    **dict.fromkeys(TRANSCODERS, _transcoder),
    "matching_pursuit": _pursuit,
}


@torch.no_grad()
def plain_of(sae: SparseAutoencoder) -> PlainSAE:
    """An SAE's weights, its normaliser folded into them.

    Raises InputError for an architecture that is no single linear encoder with a rule.
    """
    kind = kind_of(sae.config)
    if kind not in RULES:
        raise InputError("has no plain form", where="sae", given=kind, allowed=RULES)
    folded = sae.fold()
    parts = RULES[kind](folded)
    return PlainSAE(
        **{
            "W_enc": None if kind == "matching_pursuit" else folded.W_enc,
            "W_dec": folded.W_dec,
            "b_dec": folded.b_dec,
            "pre_bias": folded.pre_bias,
            "standardised": folded.normaliser.kind == "standardised",
            **{n: _float(v) for n, v in parts.items()},
        }
    )


def _float(value: Any) -> Any:
    return value.detach().to(torch.float32) if isinstance(value, Tensor) else value


@torch.no_grad()
def sae_of(plain: PlainSAE) -> SparseAutoencoder:
    """Our SAE with these weights, in evaluation mode, on the CPU."""
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
    """Copy plain weights into an SAE; each must have its place there."""
    tensors = plain.tensors()
    state = sae.state_dict()
    if "W_enc" in tensors:
        tensors["W_enc_T"] = tensors.pop("W_enc").T
    if "log_threshold" in state and "threshold" in tensors:
        tensors["log_threshold"] = tensors.pop("threshold").log()
    missing = sorted(set(tensors) - set(state))
    if missing:
        raise InputError("has no place for these weights", where="sae", given=missing)
    for name, value in tensors.items():
        state[name].copy_(value.reshape(state[name].shape))
