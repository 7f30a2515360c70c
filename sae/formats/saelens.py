"""SAELens: cfg.json and sae_weights.safetensors (the layout of version 6, and older ones).

W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc, b_dec; threshold (jumprelu); b_gate, b_mag, r_mag
and no b_enc (gated); W_skip [d_out, d_in] (skip transcoders). BatchTopK and Matryoshka SAEs are
stored as jumprelu once trained; their checkpoints, which have `topk_threshold`, are read too.

Its "layer_norm" divides by the deviation with Bessel's correction; ours, "standardised", by the
population's. The factor sqrt(d / (d - 1)) between them is put into the weights. SAELens leaves
features in units of a vector's deviation there; ours are multiplied by it.
"""

import math
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae.core.base import SparseAutoencoder, kind_of
from sae.core.plain import PlainSAE, Rule
from sae.formats import register
from sae.formats._claim import Claim
from sae.formats._format import Format
from sae.formats._ours import sae_of
from sae.formats._saelens_config import (
    CHECKPOINTS,
    LAYOUT,
    TRANSCODERS,
    SaelensConfig,
    input_scale_of,
    read_config,
)
from sae.formats._weights import Weights
from saescope import __version__
from saescope.artefact import atomic_path, write_json
from saescope.errors import InputError

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"


@register
class SAELens(Format):
    """The folder that SAELens' `SAE.load_from_disk` reads and `save_inference_model` writes."""

    name: ClassVar[str] = "saelens"
    files: ClassVar[tuple[str, ...]] = (CONFIG, WEIGHTS)
    further_files: ClassVar[tuple[str, ...]] = ("activation_scaler.json",)
    rules: ClassVar[tuple[Rule, ...]] = get_args(Rule)
    holds_transcoders: ClassVar[bool] = True
    scales_rows: ClassVar[bool] = True

    @torch.no_grad()
    def read(
        self,
        folder: Path,
        *,
        input_scale: float | None = None,
        released: PurePosixPath | None = None,
    ) -> SparseAutoencoder:
        """The SAE in a folder; see `Format.read`."""
        del released
        config = read_config(folder / CONFIG)
        plain = _plain(config, Weights.safetensors(folder / WEIGHTS))
        plain = plain.scale_input(input_scale_of(config, folder, input_scale))
        sae = sae_of(plain)
        sae.metadata = {"format": self.name, **_metadata(config)}
        return sae

    def claim(self, folder: Path, sae: SparseAutoencoder) -> Claim | None:
        """What saescope measured before it wrote the files; SAELens states nothing."""
        return Claim.from_metrics(sae.metadata.get("claimed"), f"its {CONFIG}")

    @torch.no_grad()
    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Write cfg.json and sae_weights.safetensors; see `Format.write`."""
        self.check_writable(sae)
        plain = sae.plain()
        _architecture(plain)  # says what cannot be held
        if plain.standardised:
            plain = plain.scale_input(math.sqrt(plain.d_in / (plain.d_in - 1)))
        config = _described(plain, sae)
        tensors = plain.tensors()
        if "W_skip" in tensors:
            tensors["W_skip"] = tensors["W_skip"].T.contiguous()
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            save_file(tensors, temporary / WEIGHTS)
            write_json(temporary / CONFIG, config)


def _metadata(config: SaelensConfig) -> dict[str, Any]:
    described = dict(config.describes)
    # of one head: no site here has its columns alone
    whole = described.get("hook_head_index") is None
    module = described.get("model_class_name") == "AutoModelForCausalLM"
    read, written = (
        f"module:{name}:output" if module and name else name
        for name in (described.pop("hook_name", None), described.get("hook_name_out"))
    )
    found = {
        "site": read if whole else None,
        "target_site": written if config.d_out is not None else None,
        "model": described.pop("model_name", None),
        "context": described.pop("context_size", None),
        "prepend_bos": described.get("prepend_bos"),
        "processing": list(config.processing) or None,
        "claimed": described.pop("held_out", None),
        "saelens": {"architecture": config.architecture, **described},
    }
    return {name: value for name, value in found.items() if value is not None}


def _plain(config: SaelensConfig, weights: Weights) -> PlainSAE:
    d_in, d_out = config.d_in, config.d_out or config.d_in
    d_sae = config.d_sae or weights.matrix("W_dec")[0]
    pursuit = config.architecture == "matching_pursuit"
    fields: dict[str, Any] = {
        "W_dec": weights.take("W_dec", (d_sae, d_out)),
        "b_dec": weights.take("b_dec", (d_out,)),
    }
    if not pursuit:
        fields["W_enc"] = weights.take("W_enc", (d_in, d_sae))
    if config.architecture == "gated":
        for name in ("b_gate", "b_mag", "r_mag"):
            fields[name] = weights.take(name, (d_sae,))
    elif not pursuit:
        fields["b_enc"] = weights.take("b_enc", (d_sae,))
    if "jumprelu" in config.architecture:
        fields["threshold"] = _threshold(weights, d_sae)
    if config.architecture in CHECKPOINTS:
        fields["threshold"] = weights.take("topk_threshold", ()).clamp_min(0).expand(d_sae)
    if "skip" in config.architecture:
        fields["W_skip"] = weights.take("W_skip", (d_out, d_in)).T
    fields["W_dec"] = fields["W_dec"] * _finetuned(config, weights, d_sae)
    weights.finish()
    plain = PlainSAE(
        activation=_ACTIVATIONS.get(config.architecture, config.architecture),  # type: ignore[arg-type]
        pre_bias=config.pre_bias,
        k=config.k,
        transcoder=config.architecture in TRANSCODERS,
        standardised=config.normalisation == "layer_norm",
        pursuit=_pursuit(config) if pursuit else None,
        **fields,
    )
    return plain.fold_decoder_norm() if config.rescale_by_decoder_norm else plain


_ACTIVATIONS = {
    "standard": "relu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}


def _pursuit(config: SaelensConfig) -> dict[str, Any]:
    """Its rule and defaults in our fields; SAELens takes d_in steps where it states none."""
    given = config.pursuit
    return {
        "k": given.count("max_iterations") if given.get("max_iterations") else config.d_in,
        "residual_threshold": (
            given.number("residual_threshold", low=0) if "residual_threshold" in given else 1e-2
        ),
        "stop_on_duplicate": given.flag("stop_on_duplicate_support", default=True),
    }


def _threshold(weights: Weights, d_sae: int) -> Tensor:
    """Negative ones act as 0, because SAELens rectifies too."""
    if "log_threshold" in weights:  # checkpoints before 6.48
        return weights.take("log_threshold", (d_sae,)).exp()
    return weights.take("threshold", (d_sae,)).clamp_min(0)


def _finetuned(config: SaelensConfig, weights: Weights, d_sae: int) -> Tensor | float:
    """Factors [d_sae, 1] on what features write: an old version's scale, tuned after training."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in weights:
            scale = weights.take(name, (d_sae,))
            if config.finetuned_scale:
                return scale[:, None]
            if not torch.allclose(scale, torch.ones_like(scale)):
                raise InputError(
                    "has factors for its features and says not to use them "
                    "(finetuning_scaling_factor=false): their meaning is not clear",
                    where=weights.where,
                )
    return 1.0


def _described(plain: PlainSAE, sae: SparseAutoencoder) -> dict[str, Any]:
    site = str(sae.metadata.get("site", ""))
    metadata = {
        "sae_lens_version": LAYOUT,
        "sae_lens_training_version": None,
        "model_name": sae.metadata.get("model"),
        "hook_name": site,
        "context_size": sae.metadata.get("context"),
        "training_architecture": kind_of(sae.config),
        "saescope_version": __version__,
        "held_out": sae.metadata.get("held_out"),
    }
    if plain.transcoder:
        metadata["hook_name_out"] = sae.metadata.get("target_site")
    described: dict[str, Any] = {
        "architecture": _architecture(plain),
        "d_in": plain.d_in,
        "d_sae": plain.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": plain.pre_bias,
        "normalize_activations": "layer_norm" if plain.standardised else "none",
        "reshape_activations": "hook_z" if site.endswith("hook_z") else "none",
        "metadata": {name: value for name, value in metadata.items() if value is not None},
    }
    if plain.k is not None:
        described.update(k=plain.k, rescale_acts_by_decoder_norm=False)
    if plain.transcoder:
        described["d_out"] = plain.W_dec.shape[1]
    if plain.pursuit is not None:
        described.update(
            max_iterations=plain.pursuit["k"],
            residual_threshold=plain.pursuit.get("residual_threshold", 0.0),
            stop_on_duplicate_support=plain.pursuit.get("stop_on_duplicate", False),
        )
    return described


def _architecture(plain: PlainSAE) -> str:
    if not plain.transcoder:
        return "standard" if plain.activation == "relu" else plain.activation
    if plain.activation not in ("relu", "jumprelu") or plain.standardised:
        raise InputError(
            "SAELens' transcoders are not of this kind",
            where="saelens",
            given="standardised" if plain.standardised else plain.activation,
            allowed=("relu", "jumprelu"),
        )
    middle = "" if plain.W_skip is None else "skip_"
    return f"{'' if plain.activation == 'relu' else 'jumprelu_'}{middle}transcoder"
