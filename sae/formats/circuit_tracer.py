"""circuit-tracer (decoderesearch/circuit-tracer): sets of transcoders, and cross-layer transcoders.

A folder has config.yaml (model_name, model_kind, feature_input_hook, feature_output_hook, and for
TopK activation and k) beside the weights, of which all matrices have a feature a row:

    transcoder_set           layer_N.safetensors: W_enc [d_sae, d_in], W_dec [d_sae, d_out], b_enc,
                             b_dec; activation_function.threshold [d_sae] of JumpReLU (without it,
                             ReLU); W_skip [d_out, d_in]
    cross_layer_transcoder   W_enc_N.safetensors: W_enc_N [F, d_in], b_enc_N [F], b_dec_N [d_out],
                             threshold_N [F] of JumpReLU; W_dec_N.safetensors:
                             W_dec_N [F, layers - N, d_out]

Features fire where they are above their threshold; nothing is subtracted from the input. Hooks are
those of every block, without "blocks.N.". A set's config may instead list its files
("transcoders").
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from activations.sites.names import layer_of
from sae.architectures.cross_layer_transcoder import (
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
)
from sae.core.base import SparseAutoencoder
from sae.core.plain import PlainSAE
from sae.formats import register
from sae.formats._format import Format
from sae.formats._given import Given
from sae.formats._ours import sae_of
from sae.formats._weights import Weights
from sae.formats._yaml import read_yaml, write_yaml
from saescope.artefact import atomic_path
from saescope.errors import ArtefactError, InputError
from saescope.replacing import Kind

CONFIG = "config.yaml"
SET, ACROSS = "transcoder_set", "cross_layer_transcoder"
_THRESHOLD = "activation_function.threshold"
_FIRST = "W_enc_0.safetensors"
_ENCODER = re.compile(r"W_enc_(\d{1,3})\.safetensors")
HOOKS = ("feature_input_hook", "feature_output_hook")


def is_set(folder: Path) -> bool:
    """Whether a folder holds a set of transcoders in this layout."""
    layers = (folder / "layer_0.safetensors").is_file() or not (folder / _FIRST).exists()
    return layers and (folder / CONFIG).is_file()


@register
class CircuitTracer(Format):
    """The folder of a cross-layer transcoder; sets of transcoders are `sae.load_transcoders`'."""

    name: ClassVar[str] = "circuit_tracer"
    files: ClassVar[tuple[str, ...]] = (CONFIG, "W_enc_*.safetensors", "W_dec_*.safetensors")
    holds_transcoders: ClassVar[bool] = True

    def recognise(self, folder: Path) -> bool:
        """By the first layer's encoder; or by a set's first layer, which `read` refuses."""
        return (folder / _FIRST).is_file() or is_set(folder)

    def _holds(self, cls: type[SparseAutoencoder]) -> bool:
        return issubclass(cls, CrossLayerTranscoder)

    @torch.no_grad()
    def read(
        self,
        folder: Path,
        *,
        input_scale: float | None = None,
        released: PurePosixPath | None = None,
    ) -> SparseAutoencoder:
        """The cross-layer transcoder in a folder; see `Format.read`.

        Without config.yaml it does not say which sites it reads and writes.
        """
        del released
        if not (folder / _FIRST).is_file():
            raise InputError(
                "is a set of transcoders, one a layer: sae.load_transcoders reads it",
                where=str(folder),
            )
        if input_scale not in (None, 1):
            raise InputError(
                "a transcoder's output has a scale of its own",
                where="input_scale",
                given=input_scale,
            )
        given = read_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else None
        layers = _layers_in(folder)
        read = [_read_layer(folder, layer, layers) for layer in range(layers)]
        first, rule = read[0], "jumprelu" if "threshold" in read[0] else "relu"
        features, d_in = first["W_enc"].shape
        config = CrossLayerTranscoderConfig(d_sae=layers * features, layers=layers, activation=rule)
        sae = CrossLayerTranscoder(config, layers * d_in, layers * len(first["b_dec"]))
        state = sae.state_dict()
        names = {"W_enc_T": "W_enc", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
        for ours, theirs in names.items():
            if ours in state:
                parts = [_same_shape(each, first, theirs, folder) for each in read]
                state[ours].copy_(torch.cat(parts))
        for layer, each in enumerate(read):
            state[f"decoders.{layer}"].copy_(each["W_dec"].flatten(1))
        sae.metadata = {"format": self.name, **({} if given is None else _across(given, layers))}
        return sae

    @torch.no_grad()
    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Write config.yaml and two files a layer; see `Format.write`."""
        self.check_writable(sae)
        ours = cast(CrossLayerTranscoder, sae.fold())
        if ours.config.activation == "topk":
            raise InputError(
                "its cross-layer transcoders have no TopK",
                where=self.name,
                given="topk",
                allowed="jumprelu, relu",
            )
        hooks = _common_hooks(sae.metadata.get("sites"), sae.metadata.get("target_sites"))
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for layer in range(ours.layers):
                own = ours.features_of(layer)
                encoder = {
                    f"W_enc_{layer}": ours.W_enc_T[own],
                    f"b_enc_{layer}": ours.b_enc[own],
                    f"b_dec_{layer}": ours.b_dec.chunk(ours.layers)[layer],
                }
                if ours.config.activation == "jumprelu":
                    encoder[f"threshold_{layer}"] = ours.theta[own]
                _save(encoder, temporary / f"W_enc_{layer}.safetensors")
                decoder = {f"W_dec_{layer}": ours.decoder(layer)}
                _save(decoder, temporary / f"W_dec_{layer}.safetensors")
            write_yaml(temporary / CONFIG, {**_names(sae), "model_kind": ACROSS, **hooks})


def _layers_in(folder: Path) -> int:
    numbers = sorted(
        int(found[1]) for path in folder.iterdir() if (found := _ENCODER.fullmatch(path.name))
    )
    if numbers != list(range(len(numbers))):
        raise ArtefactError(
            "encoders of some layers are missing", where=str(folder), given=f"layers {numbers}"
        )
    return len(numbers)


def _read_layer(folder: Path, layer: int, layers: int) -> dict[str, Tensor]:
    encoder = Weights.safetensors(folder / f"W_enc_{layer}.safetensors")
    shape = encoder.matrix(f"W_enc_{layer}")
    width = encoder.vector(f"b_dec_{layer}")
    found = {
        "W_enc": encoder.take(f"W_enc_{layer}", shape),
        "b_enc": encoder.take(f"b_enc_{layer}", shape[:1]),
        "b_dec": encoder.take(f"b_dec_{layer}", (width,)),
    }
    if f"threshold_{layer}" in encoder:
        found["threshold"] = _not_negative(encoder, f"threshold_{layer}", shape[0])
    encoder.finish()
    decoder = Weights.safetensors(folder / f"W_dec_{layer}.safetensors")
    found["W_dec"] = decoder.take(f"W_dec_{layer}", (shape[0], layers - layer, width))
    decoder.finish()
    return found


def _not_negative(weights: Weights, name: str, d_sae: int) -> Tensor:
    found = weights.take(name, (d_sae,))
    if bool((found < 0).any()):
        raise InputError(
            "thresholds below 0 let features be negative, which none here are",
            where=weights.where,
            given=f"{name}, down to {float(found.min()):.3g}",
        )
    return found


def _same_shape(own: dict[str, Tensor], first: dict[str, Tensor], name: str, where: Path) -> Tensor:
    if name not in own or own[name].shape != first[name].shape:
        raise ArtefactError(
            f"{name} differs in shape from layer to layer, or is missing in some",
            where=str(where),
        )
    return own[name]


# ---- sets of transcoders --------------------------------------------------------------------


@torch.no_grad()
def read_transcoder(path: Path, layer: int, given: Given) -> SparseAutoencoder:
    """One layer's transcoder of a set, from its file and the set's configuration.

    Raises ArtefactError for damaged files, InputError for what saescope cannot represent.
    """
    weights = Weights.safetensors(path)
    d_sae, d_in = weights.matrix("W_enc")
    d_out = weights.vector("b_dec")
    rule = given.get("activation") or ("jumprelu" if _THRESHOLD in weights else "relu")
    if rule not in ("topk", "relu", "jumprelu"):
        raise InputError(
            "an activation function that saescope has not",
            where=given.where,
            given=rule,
            allowed=("topk", "relu", "jumprelu"),
        )
    threshold = _not_negative(weights, _THRESHOLD, d_sae) if _THRESHOLD in weights else None
    skip = weights.take("W_skip", (d_out, d_in)).T if "W_skip" in weights else None
    k = weights.take_count("k") if "k" in weights else None
    plain = PlainSAE(
        activation=rule,
        W_enc=weights.take("W_enc", (d_sae, d_in)).T,
        W_dec=weights.take("W_dec", (d_sae, d_out)),
        b_enc=weights.take("b_enc", (d_sae,)),
        b_dec=weights.take("b_dec", (d_out,)),
        threshold=threshold if rule == "jumprelu" else None,
        k=(given.count("k") if "k" in given else k) if rule == "topk" else None,
        W_skip=skip,
        pre_bias=False,
        transcoder=True,
    )
    weights.finish()
    sae = sae_of(plain)
    sites = _sites(given, layer)
    sae.metadata = {"format": CircuitTracer.name, **_model(given), **sites}
    return sae


@torch.no_grad()
def write_set(
    transcoders: Sequence[SparseAutoencoder], folder: Path, replaced: Kind | None = None
) -> None:
    """Write transcoders, one a layer from the first on, as a set in this layout, atomically.

    Args: replaced says what may be there, and is replaced then.

    Raises InputError for what the layout cannot hold.
    """
    sites = [[sae.metadata.get(name) for sae in transcoders] for name in ("site", "target_site")]
    hooks = _common_hooks(*sites)
    plains = [sae.plain().with_pre_bias(False) for sae in transcoders]
    rules = {(plain.activation, plain.k) for plain in plains}
    if len(rules) > 1:
        raise InputError(
            "a set is of one activation function",
            where=CircuitTracer.name,
            given=sorted(str(rule) for rule in rules),
        )
    rule = {"activation": "topk", "k": plains[0].k} if plains[0].activation == "topk" else {}
    with atomic_path(folder, replaced, replace=replaced is not None) as temporary:
        temporary.mkdir()
        for layer, plain in enumerate(plains):
            tensors = plain.tensors()
            tensors["W_enc"] = tensors["W_enc"].T
            if "threshold" in tensors:
                tensors[_THRESHOLD] = tensors.pop("threshold")
            if "W_skip" in tensors:
                tensors["W_skip"] = tensors["W_skip"].T
            _save(tensors, temporary / f"layer_{layer}.safetensors")
        values = {**_names(transcoders[0]), "model_kind": SET, **hooks, **rule}
        write_yaml(temporary / CONFIG, values)


# ---- configurations -------------------------------------------------------------------------


def _names(sae: SparseAutoencoder) -> dict[str, str]:
    model = sae.metadata.get("model_spec") or sae.metadata.get("model")
    return {"model_name": str(model)} if model else {}


def _model(given: Given) -> dict[str, str]:
    return {"model": given.text("model_name")} if given.get("model_name") else {}


def _sites(given: Given, layer: int) -> dict[str, str]:
    """The sites of a layer, as `sae.load` records them."""
    read, written = (f"blocks.{layer}.{given.text(name)}" for name in HOOKS)
    return {"site": read, "target_site": written}


def _across(given: Given, layers: int) -> dict[str, Any]:
    if given.get("model_kind", ACROSS) != ACROSS:
        raise InputError(
            "its files are of a cross-layer transcoder",
            where=given.where,
            given=given["model_kind"],
        )
    found = [_sites(given, layer) for layer in range(layers)]
    read, written = ([each[name] for each in found] for name in ("site", "target_site"))
    return {**_model(given), "site": read[0], "sites": read, "target_sites": written}


def _common_hooks(read: Any, written: Any) -> dict[str, str]:
    """The hook in every block that is read, and the one that is written.

    Raises InputError unless sites are those of all blocks from the first on.
    """
    found = {}
    for name, sites in zip(HOOKS, (read, written), strict=True):
        named = [str(site) for site in sites or ()]
        hooks = {site.partition(".")[2].partition(".")[2] for site in named}
        layers = [layer_of(site) for site in named]
        if len(hooks) != 1 or layers != list(range(len(layers))):
            raise InputError(
                "circuit-tracer's sets are of the same site in every block, from the first on",
                where=name,
                given=named[:4] or None,
            )
        found[name] = hooks.pop()
    return found


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().float().contiguous() for name, value in tensors.items()}, path)
