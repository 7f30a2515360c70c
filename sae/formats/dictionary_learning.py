"""dictionary_learning: ae.pt (a state dict, read without executing anything) and config.json.

    AutoEncoder             encoder.weight [d_sae, d_in], encoder.bias, decoder.weight, bias
    AutoEncoderNew          decoder.bias instead of bias, and b_dec is not subtracted
    GatedAutoEncoder        encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias
    AutoEncoderTopK         encoder.*, decoder.weight, b_dec, k, threshold (not used to encode);
                            before December 2024 k is in config.json alone
    BatchTopKSAE            the same; fires above its one threshold
    JumpReluAutoEncoder     W_enc [d_in, d_sae], b_enc, W_dec, b_dec not subtracted, threshold
    MatryoshkaBatchTopKSAE  W_enc, b_enc, W_dec, b_dec, k, threshold, group_sizes

Its trainer multiplies the biases by the norm factor when it saves, so ae.pt is for activations in
the model's units; a checkpoint that missed this needs input_scale. Its own loader rescales
AutoEncoder's rows to norm 1, and the features with them; here the file is taken as it is.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch import Tensor

from activations.sites.names import layer_of
from sae.core.base import SparseAutoencoder, kind_of
from sae.core.plain import PlainSAE, Rule
from sae.formats import register
from sae.formats._format import Format, released_as
from sae.formats._given import Given
from sae.formats._ours import sae_of
from sae.formats._weights import Weights
from saescope.artefact import atomic_path, write_json
from saescope.errors import ArtefactError, InputError

WEIGHTS = "ae.pt"
CONFIG = "config.json"
_RESIDUAL = re.compile(r"(?:.*/)?resid_post_layer_(\d{1,3})/trainer_\d+")
"""how releases name the folder of one trainer on the residual stream"""


@register
class DictionaryLearning(Format):
    """The folder of one trainer."""

    name: ClassVar[str] = "dictionary_learning"
    files: ClassVar[tuple[str, ...]] = (WEIGHTS,)
    further_files: ClassVar[tuple[str, ...]] = (CONFIG,)
    rules: ClassVar[tuple[Rule, ...]] = ("relu", "gated", "topk", "jumprelu")

    @torch.no_grad()
    def read(
        self,
        folder: Path,
        *,
        input_scale: float | None = None,
        released: PurePosixPath | None = None,
    ) -> SparseAutoencoder:
        """The SAE in a folder; see `Format.read`."""
        path = folder / CONFIG
        described = Given.read(path) if path.is_file() else Given({}, str(path))
        trainer = described.table("trainer")
        weights = Weights.state_dict(folder / WEIGHTS)
        stated = trainer.text("dict_class") if trainer.get("dict_class") is not None else None
        kind = _kind(weights, stated)
        k = trainer.count("k") if trainer.get("k") is not None else None
        plain = _READERS[kind](weights, k)
        weights.finish()
        sae = sae_of(plain.scale_input(input_scale or 1.0))
        sae.metadata = {"format": self.name, "dict_class": kind, **_facts(trainer)}
        named = _RESIDUAL.fullmatch(released_as(folder, released).as_posix())
        if named and "submodule" not in sae.metadata:
            sae.metadata.setdefault("site", f"blocks.{int(named[1])}.hook_resid_post")
        return sae

    @torch.no_grad()
    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Write ae.pt and config.json; see `Format.write`."""
        self.check_writable(sae)
        plain = sae.plain()
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


def _facts(trainer: Given) -> dict[str, Any]:
    """The model and the submodule; the residual stream's is the only one that names a site."""
    facts = {}
    for ours, theirs in (("model", "lm_name"), ("submodule", "submodule_name")):
        if trainer.get(theirs) is not None and trainer.text(theirs):
            facts[ours] = trainer.text(theirs)
    layer = trainer.count("layer", low=0) if trainer.get("layer") is not None else None
    submodule = facts.get("submodule", "")
    named = re.fullmatch(r"resid_post_layer_(\d{1,3})", submodule)
    if named and layer not in (None, int(named[1])):
        raise ArtefactError(
            "layer and submodule_name differ", where=trainer.where, given=layer, allowed=submodule
        )
    if named:
        facts["site"] = f"blocks.{int(named[1])}.hook_resid_post"
    elif submodule == "resid_post" and layer is not None:
        facts["site"] = f"blocks.{layer}.hook_resid_post"
    elif re.fullmatch(r"blocks\.\d{1,3}\.[\w.]+", submodule):  # as saescope writes it
        facts["site"] = submodule
    return facts


def _agreed_k(weights: Weights, stated: int | None) -> int:
    """k: in the weights since December 2024, before that in config.json alone."""
    if "k" not in weights:
        if stated is None:
            raise ArtefactError(
                "k is neither in the weights nor in config.json", where=weights.where
            )
        return stated
    k = weights.take_count("k")
    if stated not in (None, k):
        raise ArtefactError(
            "k differs between the weights and config.json",
            where=weights.where,
            given=stated,
            allowed=str(k),
        )
    return k


def _kind(weights: Weights, stated: str | None) -> str:
    """The class that the tensors' names are of, which the configuration must agree with."""
    if stated is not None and stated not in _READERS:
        raise InputError(
            "a dictionary that saescope has not",
            where=weights.where,
            given=stated,
            allowed=_READERS,
        )
    found = set(weights.left)
    fitting = [
        name
        for name, keys in _KEYS.items()
        if keys <= found and found <= keys | _OPTIONAL.get(name, set())
    ]
    if not fitting:
        raise ArtefactError(
            "these tensors are of no dictionary that saescope has",
            where=weights.where,
            given=sorted(weights.left)[:20],
            allowed=_READERS,
        )
    if stated is None and len(fitting) > 1:
        raise InputError(
            f"{CONFIG} is missing, and the tensors fit several dictionaries",
            where=weights.where,
            given=fitting,
        )
    if stated is not None and stated not in fitting:
        raise ArtefactError(
            "the tensors are not of the dictionary that config.json names",
            where=weights.where,
            given=stated,
            allowed=fitting,
        )
    return stated or fitting[0]


def _linear(weights: Weights) -> dict[str, Any]:
    d_sae, d_in = weights.matrix("encoder.weight")
    return {
        "W_enc": weights.take("encoder.weight", (d_sae, d_in)).T,
        "W_dec": weights.take("decoder.weight", (d_in, d_sae)).T,
    }


def _read_autoencoder(weights: Weights, k: int | None) -> PlainSAE:
    del k
    fields = _linear(weights)
    d_in, d_sae = fields["W_enc"].shape
    own = "bias" in weights
    return PlainSAE(
        activation="relu",
        b_enc=weights.take("encoder.bias", (d_sae,)),
        b_dec=weights.take("bias" if own else "decoder.bias", (d_in,)),
        pre_bias=own,
        **fields,
    )


def _read_gated(weights: Weights, k: int | None) -> PlainSAE:
    del k
    fields = _linear(weights)
    d_in, d_sae = fields["W_enc"].shape
    return PlainSAE(
        activation="gated",
        b_dec=weights.take("decoder_bias", (d_in,)),
        b_gate=weights.take("gate_bias", (d_sae,)),
        b_mag=weights.take("mag_bias", (d_sae,)),
        r_mag=weights.take("r_mag", (d_sae,)),
        **fields,
    )


def _read_topk(weights: Weights, k: int | None) -> PlainSAE:
    fields = _linear(weights)
    d_in, d_sae = fields["W_enc"].shape
    weights.drop("threshold")
    return PlainSAE(
        activation="topk",
        k=_agreed_k(weights, k),
        b_enc=weights.take("encoder.bias", (d_sae,)),
        b_dec=weights.take("b_dec", (d_in,)),
        **fields,
    )


def _read_batchtopk(weights: Weights, k: int | None) -> PlainSAE:
    fields = _linear(weights)
    d_in, d_sae = fields["W_enc"].shape
    _agreed_k(weights, k)
    return PlainSAE(
        activation="jumprelu",
        b_enc=weights.take("encoder.bias", (d_sae,)),
        b_dec=weights.take("b_dec", (d_in,)),
        threshold=_one_threshold(weights, d_sae),
        **fields,
    )


def _read_matryoshka(weights: Weights, k: int | None) -> PlainSAE:
    d_in, d_sae = weights.matrix("W_enc")
    _agreed_k(weights, k)
    weights.drop("group_sizes")
    return PlainSAE(
        activation="jumprelu",
        W_enc=weights.take("W_enc", (d_in, d_sae)),
        W_dec=weights.take("W_dec", (d_sae, d_in)),
        b_enc=weights.take("b_enc", (d_sae,)),
        b_dec=weights.take("b_dec", (d_in,)),
        threshold=_one_threshold(weights, d_sae),
    )


def _one_threshold(weights: Weights, d_sae: int) -> Tensor:
    """-1 until the trainer has begun to estimate it; the rectifier makes 0 of that.

    Raises InputError where there is none, as before December 2024.
    """
    if "threshold" not in weights:
        raise InputError(
            "was saved before dictionary_learning estimated a threshold: which of its features "
            "fire depends on the other rows of a batch, and on one row it has no rule",
            where=weights.where,
            given="no threshold",
        )
    return weights.take("threshold", ()).clamp_min(0).expand(d_sae)


def _read_jumprelu(weights: Weights, k: int | None) -> PlainSAE:
    del k
    d_in, d_sae = weights.matrix("W_enc")
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
        "encoder.weight",
        "decoder.weight",
        "decoder_bias",
        "r_mag",
        "gate_bias",
        "mag_bias",
    },
    "AutoEncoderTopK": {*_LINEAR, "b_dec"},
    "BatchTopKSAE": {*_LINEAR, "b_dec"},
    "JumpReluAutoEncoder": _MATRICES,
    "MatryoshkaBatchTopKSAE": {*_MATRICES, "k", "group_sizes"},
}
_OPTIONAL = {"AutoEncoderTopK": {"k", "threshold"}, "BatchTopKSAE": {"k", "threshold"}}
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
