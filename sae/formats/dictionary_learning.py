"""dictionary_learning: ae.pt (a state dict, read without executing anything) and config.json.

    AutoEncoder             encoder.weight [d_sae, d_in], encoder.bias, decoder.weight, bias
    AutoEncoderNew          decoder.bias instead of bias, and b_dec is not subtracted
    GatedAutoEncoder        encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias
    AutoEncoderTopK         encoder.*, decoder.weight, b_dec, k, threshold (not used to encode)
    BatchTopKSAE            the same; fires above its one threshold
    JumpReluAutoEncoder     W_enc [d_in, d_sae], b_enc, W_dec, b_dec not subtracted, threshold
    MatryoshkaBatchTopKSAE  W_enc, b_enc, W_dec, b_dec, k, threshold, group_sizes

Its trainer multiplies the biases by the norm factor when it saves, so ae.pt is for activations in
the model's units; a checkpoint that missed this needs input_scale. Its own loader rescales
AutoEncoder's rows to norm 1, and the features with them; here the file is taken as it is.
"""

import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae.base import SparseAutoencoder, kind_of
from sae.formats import register
from sae.formats._format import Format
from sae.formats._ours import THRESHOLDS, TOPK, plain_of, sae_of
from sae.formats._plain import PlainSAE
from sae.formats._weights import Weights, layer_of
from saescope.artefact import atomic_path, read_json, write_json
from saescope.errors import ArtefactError, InputError

WEIGHTS = "ae.pt"
CONFIG = "config.json"


@register
class DictionaryLearning(Format):
    """The folder of one trainer."""

    name: ClassVar[str] = "dictionary_learning"
    files: ClassVar[tuple[str, ...]] = (WEIGHTS,)
    further_files: ClassVar[tuple[str, ...]] = (CONFIG,)
    writes: ClassVar[tuple[str, ...]] = ("relu", "gated", *TOPK, *THRESHOLDS)

    @torch.no_grad()
    def read(self, folder: Path, *, input_scale: float | None = None) -> SparseAutoencoder:
        """The SAE in a folder; see `Format.read`."""
        path = folder / CONFIG
        described = read_json(path) if path.is_file() else {}
        weights = _load(folder / WEIGHTS)
        trainer = described.get("trainer") or {}
        kind = _kind(weights, trainer.get("dict_class"))
        plain = _READERS[kind](weights)
        if plain.k is not None and trainer.get("k") not in (None, plain.k):
            raise ArtefactError(
                "k differs between the weights and config.json", where=str(folder),
                given=trainer["k"], allowed=str(plain.k),
            )  # fmt: skip
        weights.finish()
        sae = sae_of(plain.scale_input(input_scale or 1.0))
        sae.metadata = {"format": self.name, "dict_class": kind}
        for ours, theirs in (("model", "lm_name"), ("submodule", "submodule_name")):
            if trainer.get(theirs):
                sae.metadata[ours] = trainer[theirs]
        if isinstance(trainer.get("layer"), int) and "resid_post" in str(trainer):
            sae.metadata["site"] = f"blocks.{trainer['layer']}.hook_resid_post"
        return sae

    @torch.no_grad()
    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Write ae.pt and config.json; see `Format.write`."""
        self.check_writable(sae)
        plain = plain_of(sae)
        dict_class, tensors = _state(plain)
        trainer: dict[str, Any] = {
            "dict_class": dict_class,
            "trainer_class": f"saescope.{kind_of(sae.config)}",
            "activation_dim": plain.d_in,
            "dict_size": plain.d_sae,
            "layer": layer_of(str(sae.metadata.get("site", ""))),
            "lm_name": str(sae.metadata.get("model", "")),
            "submodule_name": sae.metadata.get("site"),
        }
        if plain.k is not None:
            trainer["k"] = plain.k
        buffer = {"ctx_len": sae.metadata.get("context")}
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            torch.save(tensors, temporary / WEIGHTS)
            write_json(temporary / CONFIG, {"trainer": trainer, "buffer": buffer})


def _load(path: Path) -> Weights:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ArtefactError("weights are missing", where=str(path)) from None
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        what = f"damaged weights, or more than weights: {str(error).splitlines()[0]}"
        raise ArtefactError(what, where=str(path)) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ArtefactError("is not a state dict of tensors", where=str(path))
    return Weights(state, str(path))


def _kind(weights: Weights, stated: str | None) -> str:
    """The class that the tensors' names are of, which the configuration must agree with."""
    if stated is not None and stated not in _READERS:
        raise InputError(
            "a dictionary that saescope has not", where=weights.where, given=stated,
            allowed=_READERS,
        )  # fmt: skip
    fitting = [name for name, keys in _KEYS.items() if keys <= set(weights.left)]
    fitting = [name for name in fitting if set(weights.left) <= _KEYS[name] | _OPTIONAL]
    if not fitting:
        raise ArtefactError(
            "these tensors are of no dictionary that saescope has", where=weights.where,
            given=sorted(weights.left), allowed=_READERS,
        )  # fmt: skip
    if stated is None and len(fitting) > 1:
        raise InputError(
            f"{CONFIG} is missing, and the tensors fit several dictionaries",
            where=weights.where, given=fitting,
        )  # fmt: skip
    if stated is not None and stated not in fitting:
        raise ArtefactError(
            "the tensors are not of the dictionary that config.json names", where=weights.where,
            given=stated, allowed=fitting,
        )  # fmt: skip
    return stated or fitting[0]


def _linear(weights: Weights) -> dict[str, Any]:
    d_sae, d_in = weights.shape("encoder.weight")
    return {
        "W_enc": weights.take("encoder.weight", (d_sae, d_in)).T,
        "W_dec": weights.take("decoder.weight", (d_in, d_sae)).T,
    }


def _read_autoencoder(weights: Weights) -> PlainSAE:
    parts = _linear(weights)
    d_in, d_sae = parts["W_enc"].shape
    own = "bias" in weights
    return PlainSAE(
        activation="relu",
        b_enc=weights.take("encoder.bias", (d_sae,)),
        b_dec=weights.take("bias" if own else "decoder.bias", (d_in,)),
        pre_bias=own,
        **parts,
    )


def _read_gated(weights: Weights) -> PlainSAE:
    parts = _linear(weights)
    d_in, d_sae = parts["W_enc"].shape
    return PlainSAE(
        activation="gated",
        b_dec=weights.take("decoder_bias", (d_in,)),
        b_gate=weights.take("gate_bias", (d_sae,)),
        b_mag=weights.take("mag_bias", (d_sae,)),
        r_mag=weights.take("r_mag", (d_sae,)),
        **parts,
    )


def _read_topk(weights: Weights) -> PlainSAE:
    parts = _linear(weights)
    d_in, d_sae = parts["W_enc"].shape
    k = int(weights.take("k", ()))
    if "threshold" in weights:
        weights.take("threshold", ())
    return PlainSAE(
        activation="topk",
        k=k,
        b_enc=weights.take("encoder.bias", (d_sae,)),
        b_dec=weights.take("b_dec", (d_in,)),
        **parts,
    )


def _read_batchtopk(weights: Weights) -> PlainSAE:
    parts = _linear(weights)
    d_in, d_sae = parts["W_enc"].shape
    weights.take("k", ())
    return PlainSAE(
        activation="jumprelu",
        b_enc=weights.take("encoder.bias", (d_sae,)),
        b_dec=weights.take("b_dec", (d_in,)),
        threshold=_one_threshold(weights, d_sae),
        **parts,
    )


def _read_matryoshka(weights: Weights) -> PlainSAE:
    d_in, d_sae = weights.shape("W_enc")
    weights.take("k", ())
    weights.take("group_sizes", weights.shape("group_sizes"))
    return PlainSAE(
        activation="jumprelu",
        W_enc=weights.take("W_enc", (d_in, d_sae)),
        W_dec=weights.take("W_dec", (d_sae, d_in)),
        b_enc=weights.take("b_enc", (d_sae,)),
        b_dec=weights.take("b_dec", (d_in,)),
        threshold=_one_threshold(weights, d_sae),
    )


def _one_threshold(weights: Weights, d_sae: int) -> Tensor:
    """-1 until the trainer has begun to estimate it; the rectifier makes 0 of that."""
    return weights.take("threshold", ()).clamp_min(0).expand(d_sae)


def _read_jumprelu(weights: Weights) -> PlainSAE:
    d_in, d_sae = weights.shape("W_enc")
    return PlainSAE(
        activation="jumprelu",
        W_enc=weights.take("W_enc", (d_in, d_sae)),
        W_dec=weights.take("W_dec", (d_sae, d_in)),
        b_enc=weights.take("b_enc", (d_sae,)),
        b_dec=weights.take("b_dec", (d_in,)),
        threshold=weights.take("threshold", (d_sae,)).clamp_min(0),
        pre_bias=False,
    )


_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_MATRICES = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
_KEYS = {
    "AutoEncoder": {*_LINEAR, "bias"},
    "AutoEncoderNew": {*_LINEAR, "decoder.bias"},
    "GatedAutoEncoder": {
        "encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias",
    },
    "AutoEncoderTopK": {*_LINEAR, "b_dec", "k"},
    "BatchTopKSAE": {*_LINEAR, "b_dec", "k", "threshold"},
    "JumpReluAutoEncoder": _MATRICES,
    "MatryoshkaBatchTopKSAE": {*_MATRICES, "k", "group_sizes"},
}  # fmt: skip
_OPTIONAL = {"threshold"}
_READERS = {
    "AutoEncoder": _read_autoencoder,
    "AutoEncoderNew": _read_autoencoder,
    "GatedAutoEncoder": _read_gated,
    "AutoEncoderTopK": _read_topk,
    "BatchTopKSAE": _read_batchtopk,
    "JumpReluAutoEncoder": _read_jumprelu,
    "MatryoshkaBatchTopKSAE": _read_matryoshka,
}


def _state(plain: PlainSAE) -> tuple[str, dict[str, Tensor]]:
    """The dictionary's class and its state dict."""
    t = plain.with_pre_bias(plain.activation != "jumprelu").tensors()
    if plain.activation == "jumprelu":
        return "JumpReluAutoEncoder", t
    linear = {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "decoder.weight": t["W_dec"].T.contiguous(),
    }
    if plain.activation == "gated":
        biases = {"decoder_bias": t["b_dec"], "gate_bias": t["b_gate"], "mag_bias": t["b_mag"]}
        return "GatedAutoEncoder", {**linear, **biases, "r_mag": t["r_mag"]}
    linear["encoder.bias"] = t["b_enc"]
    if plain.activation == "relu":
        return "AutoEncoder", {**linear, "bias": t["b_dec"]}
    counts = {"k": torch.tensor(plain.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    return "AutoEncoderTopK", {**linear, "b_dec": t["b_dec"], **counts}
