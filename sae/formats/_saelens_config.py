"""SAELens' cfg.json: what it says of an SAE's function, in any version's spelling.

Since version 6 a configuration has few keys, all of them known here: another is an error. Before,
it was the whole training run's: the keys that decide the function are read, and every tensor of the
weights must have a place.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saescope.artefact import read_json
from saescope.errors import ArtefactError, InputError

LAYOUT = "6.54.12"
"""the version of SAELens whose layout is written"""
TRANSCODERS = (
    "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder",
)  # fmt: skip
CHECKPOINTS = ("batchtopk", "matryoshka_batchtopk")
"""architectures that SAELens has in training only"""
READ = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit", *TRANSCODERS,
        *CHECKPOINTS)  # fmt: skip

_COMMON = {
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input",
    "normalize_activations", "reshape_activations", "metadata",
    "finetuning_scaling_factor",
}  # fmt: skip
_OWN = {
    "topk": {"k", "rescale_acts_by_decoder_norm"},
    "matching_pursuit": {"residual_threshold", "max_iterations", "stop_on_duplicate_support"},
    **{name: {"d_out"} for name in TRANSCODERS},
}
_OWN["abstopk"] = _OWN["batchtopk"] = _OWN["matryoshka_batchtopk"] = _OWN["topk"]
_TRAINING = {
    "decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "use_sparse_activations",
    "aux_loss_coefficient", "topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss",
    "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale", "jumprelu_ste_to_input", "l0_coefficient", "l0_warm_up_steps",
    "pre_act_loss_coefficient", "target_l0",
}  # fmt: skip
"""keys of checkpoints that change nothing once trained"""
_DESCRIBES = (
    "model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path",
    "neuronpedia_id", "hook_name_out", "model_class_name", "seqpos_slice", "hf_hook_name",
    "exclude_special_tokens", "model_from_pretrained_kwargs", "sae_lens_version",
    "training_architecture", "hook_layer", "held_out",
)  # fmt: skip

NOT_FOLDED = (
    "was saved before the scale of its inputs was folded into its weights "
    "(normalize_activations='expected_average_only_in'), and the scale is not in the folder "
    "(activation_scaler.json); give it as input_scale: sqrt(d_in) over the mean norm of the "
    "activations it was trained on"
)


@dataclass(frozen=True, kw_only=True)
class SaelensConfig:
    """The part of a configuration that decides the function, and what it says of the data."""

    architecture: str
    d_in: int
    d_sae: int | None
    d_out: int | None
    pre_bias: bool
    normalisation: str
    k: float | None
    rescale_by_decoder_norm: bool
    finetuned_scale: bool
    pursuit: dict[str, Any]
    describes: dict[str, Any] = field(default_factory=dict)


def read_config(path: Path) -> SaelensConfig:
    """Read and check a cfg.json.

    Raises ArtefactError if it is damaged, InputError for what saescope cannot represent.
    """
    given = read_json(path)
    if not isinstance(given, dict):
        raise ArtefactError("is not an SAE's configuration", where=str(path))
    metadata = given.get("metadata") or {}
    version = str(given.get("sae_lens_version") or metadata.get("sae_lens_version") or "")
    old = not version or int(version.split(".")[0]) < 6
    try:
        return _old(given, str(path)) if old else _new(given, metadata, str(path))
    except KeyError as error:
        raise ArtefactError(f"{error} is missing", where=str(path)) from None


def _new(given: dict[str, Any], metadata: dict[str, Any], where: str) -> SaelensConfig:
    architecture = _architecture(given["architecture"], where)
    own = _OWN.get(architecture, set())
    unknown = sorted(set(given) - _COMMON - own - _TRAINING)
    if unknown:
        raise InputError(
            "keys that this reader does not know, so the SAE might be another", where=where,
            given=unknown, allowed=sorted(_COMMON | own),
        )  # fmt: skip
    return _config(given, architecture, metadata, where)


def _old(given: dict[str, Any], where: str) -> SaelensConfig:
    given = dict(given)
    for name, since in (("hook_point", "hook_name"), ("activation_fn_str", "activation_fn")):
        if name in given:
            given[since] = given.pop(name)
    activation = given.get("activation_fn") or "relu"
    if activation not in ("relu", "topk"):
        raise InputError(
            "an activation function that saescope has not", where=where, given=activation,
            allowed=("relu", "topk"),
        )  # fmt: skip
    architecture = given.get("architecture") or "standard"
    if activation == "topk":
        architecture = "topk"
        given["k"] = (given.get("activation_fn_kwargs") or {}).get("k", given.get("k"))
    normalisation = given.get("normalize_activations")
    if isinstance(normalisation, bool):
        given["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    described = {**given, **(given.get("metadata") or {})}
    return _config(given, _architecture(architecture, where), described, where)


def _architecture(name: str, where: str) -> str:
    if name not in READ:
        raise InputError(
            "an architecture of SAELens that saescope has not", where=where, given=name,
            allowed=READ,
        )  # fmt: skip
    return name


def _config(
    given: dict[str, Any], architecture: str, metadata: dict[str, Any], where: str
) -> SaelensConfig:
    transcoder = architecture in TRANSCODERS
    normalisation = given.get("normalize_activations") or "none"
    if normalisation not in ("none", "layer_norm", "expected_average_only_in"):
        raise InputError(
            "a normalisation of each input that saescope has not", where=where,
            given=normalisation, allowed=("none", "layer_norm", "expected_average_only_in"),
        )  # fmt: skip
    if transcoder and normalisation != "none":
        raise InputError(
            "a transcoder whose inputs are normalised", where=where, given=normalisation,
            allowed="none",
        )  # fmt: skip
    pre_bias = bool(given.get("apply_b_dec_to_input", not transcoder))
    if transcoder and pre_bias:
        raise InputError(
            "a transcoder's output bias cannot be subtracted from its input", where=where,
            given="apply_b_dec_to_input=true",
        )  # fmt: skip
    k = given.get("k")
    if k is None and architecture in ("topk", "abstopk"):
        raise ArtefactError("k is missing", where=where)
    return SaelensConfig(
        architecture=architecture,
        d_in=int(given["d_in"]),
        d_sae=int(given["d_sae"]) if given.get("d_sae") else None,
        d_out=int(given.get("d_out", given["d_in"])) if transcoder else None,
        pre_bias=pre_bias,
        normalisation=normalisation,
        k=k,
        rescale_by_decoder_norm=bool(
            given.get("rescale_acts_by_decoder_norm", architecture in CHECKPOINTS)
        ),
        finetuned_scale=bool(given.get("finetuning_scaling_factor", False)),
        pursuit={n: given[n] for n in _OWN["matching_pursuit"] if n in given},
        describes={n: metadata[n] for n in _DESCRIBES if metadata.get(n) is not None},
    )


def input_scale_of(config: SaelensConfig, folder: Path, given: float | None) -> float:
    """The factor still to be folded into the weights; InputError if it is not known."""
    if config.normalisation == "layer_norm":
        return math.sqrt((config.d_in - 1) / config.d_in) * (given or 1.0)
    if config.normalisation == "none" or given is not None:
        return given or 1.0
    path = folder / "activation_scaler.json"
    stored = read_json(path).get("scaling_factor") if path.exists() else None
    if not stored:
        raise InputError(NOT_FOLDED, where=str(folder))
    return float(stored)
