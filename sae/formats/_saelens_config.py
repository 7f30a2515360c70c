"""SAELens' cfg.json: what it says of an SAE's function, in any version's spelling.

Since version 6 a configuration has few keys, all of them known here: another is an error. Before,
it was the whole training run's: the keys that decide the function are read, and every tensor of the
weights must be known. What a missing key means depends on the version that wrote the file,
which `sae_lens_version` says (SAELens' changelog and history):

    before 3.19.3   the model's weights were processed by TransformerLens' defaults (centred, norms
                    and value biases folded); from it on only as model_from_pretrained_kwargs says
    before 6        apply_b_dec_to_input and prepend_bos are true where they are missing
    before 6.14     pre-activations were not multiplied by decoder norms; from it on
                    rescale_acts_by_decoder_norm says, true in training where it is missing
    before 6.48     checkpoints have the logarithm of JumpReLU's thresholds
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.formats._given import Given
from saescope.errors import ArtefactError, InputError

LAYOUT = "6.54.12"
"""the version of SAELens whose layout is written"""
TRANSCODERS = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
CHECKPOINTS = ("batchtopk", "matryoshka_batchtopk")
"""architectures that SAELens has in training only"""
READ = (
    "standard",
    "gated",
    "topk",
    "abstopk",
    "jumprelu",
    "matching_pursuit",
    *TRANSCODERS,
    *CHECKPOINTS,
)

_COMMON = {
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "metadata",
    "finetuning_scaling_factor",
}
_OWN = {
    "topk": {"k", "rescale_acts_by_decoder_norm"},
    "matching_pursuit": {"residual_threshold", "max_iterations", "stop_on_duplicate_support"},
    **{name: {"d_out"} for name in TRANSCODERS},
}
_OWN["abstopk"] = _OWN["batchtopk"] = _OWN["matryoshka_batchtopk"] = _OWN["topk"]
_TRAINING = {
    "decoder_init_norm",
    "l1_coefficient",
    "lp_norm",
    "l1_warm_up_steps",
    "use_sparse_activations",
    "aux_loss_coefficient",
    "topk_threshold_lr",
    "matryoshka_widths",
    "use_matryoshka_aux_loss",
    "jumprelu_init_threshold",
    "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale",
    "jumprelu_ste_to_input",
    "l0_coefficient",
    "l0_warm_up_steps",
    "pre_act_loss_coefficient",
    "target_l0",
}
"""keys of checkpoints that change nothing once trained"""
_DESCRIBES = (
    "model_name",
    "hook_name",
    "hook_head_index",
    "context_size",
    "prepend_bos",
    "dataset_path",
    "neuronpedia_id",
    "hook_name_out",
    "model_class_name",
    "seqpos_slice",
    "hf_hook_name",
    "exclude_special_tokens",
    "model_from_pretrained_kwargs",
    "sae_lens_version",
    "training_architecture",
    "hook_layer",
    "held_out",
)

RESCALED_SINCE = (6, 14)
PROCESSED_BEFORE = (3, 19, 3)
PROCESSING = (
    "center_writing_weights",
    "fold_ln",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
"""what TransformerLens does to a model's weights that changes activations"""

NOT_FOLDED = (
    "was saved before the scale of its inputs was folded into its weights "
    "(normalize_activations='expected_average_only_in'), and the scale is not in the folder "
    "(activation_scaler.json); give it as input_scale: sqrt(d_in) over the mean norm of the "
    "activations it was trained on"
)


@dataclass(frozen=True, kw_only=True)
class SaelensConfig:
    """What of a configuration decides the function, and what it says of the data."""

    architecture: str
    d_in: int
    d_sae: int | None
    d_out: int | None
    pre_bias: bool
    normalisation: str
    k: int | None
    rescale_by_decoder_norm: bool
    finetuned_scale: bool
    pursuit: Given
    processing: tuple[str, ...]
    """what was done to the weights of the model whose activations it is for"""
    describes: dict[str, Any] = field(default_factory=dict)


def read_config(path: Path) -> SaelensConfig:
    """Read and check a cfg.json.

    Raises ArtefactError if it is damaged, InputError for what saescope cannot represent.
    """
    given = Given.read(path)
    metadata = given.table("metadata")
    name = next((g for g in (given, metadata) if g.get("sae_lens_version") is not None), None)
    version = _version(name.text("sae_lens_version") if name else "0", str(path))
    return _new(given, metadata, version) if version >= (6,) else _old(given, metadata, version)


def _version(text: str, where: str) -> tuple[int, ...]:
    """Major, minor and patch, of a release or of one that leads to it.

    >>> _version("6.14.0", ""), _version("6.0.0-rc.2", "")
    ((6, 14, 0), (6, 0, 0))
    """
    found = re.match(r"v?(\d{1,4})(?:\.(\d{1,4}))?(?:\.(\d{1,4}))?(?![\d.])", text)
    if not found:
        raise ArtefactError("no version of SAELens", where=where, given=text[:60])
    return tuple(int(number or 0) for number in found.groups())


def _new(given: Given, metadata: Given, version: tuple[int, ...]) -> SaelensConfig:
    architecture = _architecture(given["architecture"], given.where)
    own = _OWN.get(architecture, set())
    given.refuse_unknown(_COMMON | own | _TRAINING, sorted(_COMMON | own))
    return _config(given, architecture, metadata, version)


def _old(given: Given, metadata: Given, version: tuple[int, ...]) -> SaelensConfig:
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    values = {renamed.get(name, name): value for name, value in given.items()}
    activation = values.get("activation_fn") or "relu"
    if activation not in ("relu", "topk"):
        raise InputError(
            "an activation function that saescope has not",
            where=given.where,
            given=activation,
            allowed=("relu", "topk"),
        )
    architecture = values.get("architecture") or "standard"
    if activation == "topk":
        architecture = "topk"
        options = given.table("activation_fn_kwargs")
        values["k"] = options.get("k", values.get("k"))
    normalisation = values.get("normalize_activations")
    if isinstance(normalisation, bool):
        values["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    values.setdefault("prepend_bos", True)
    found = Given(values, given.where)
    described = Given({**values, **metadata}, given.where)
    return _config(found, _architecture(architecture, given.where), described, version)


def _architecture(name: object, where: str) -> str:
    if name == "temporal":
        raise InputError(
            "its codes depend on earlier tokens, so it is no SAE of rows; sae.load_predictive "
            "reads it",
            where=where,
            given=name,
            allowed=READ,
        )
    if name not in READ:
        raise InputError(
            "an architecture of SAELens that saescope has not",
            where=where,
            given=name,
            allowed=READ,
        )
    return str(name)


def _config(
    given: Given, architecture: str, metadata: Given, version: tuple[int, ...]
) -> SaelensConfig:
    where = given.where
    transcoder = architecture in TRANSCODERS
    normalisation = given.get("normalize_activations") or "none"
    if normalisation not in ("none", "layer_norm", "expected_average_only_in"):
        raise InputError(
            "a normalisation of each input that saescope has not",
            where=where,
            given=normalisation,
            allowed=("none", "layer_norm", "expected_average_only_in"),
        )
    if transcoder and normalisation != "none":
        raise InputError(
            "a transcoder whose inputs are normalised",
            where=where,
            given=normalisation,
            allowed="none",
        )
    pre_bias = given.flag("apply_b_dec_to_input", default=not transcoder)
    if transcoder and pre_bias:
        raise InputError(
            "a transcoder's output bias cannot be subtracted from its input",
            where=where,
            given="apply_b_dec_to_input=true",
        )
    has_k = architecture in ("topk", "abstopk")
    rescales = architecture in CHECKPOINTS and version >= RESCALED_SINCE
    d_in = given.count("d_in")
    return SaelensConfig(
        architecture=architecture,
        d_in=d_in,
        d_sae=given.count("d_sae") if given.get("d_sae") is not None else None,
        d_out=given.count("d_out")
        if transcoder and "d_out" in given
        else d_in
        if transcoder
        else None,
        pre_bias=pre_bias,
        normalisation=normalisation,
        k=_k(given) if has_k else None,
        rescale_by_decoder_norm=given.flag("rescale_acts_by_decoder_norm", default=rescales),
        finetuned_scale=given.flag("finetuning_scaling_factor"),
        pursuit=Given({n: given[n] for n in _OWN["matching_pursuit"] if n in given}, where),
        processing=_processing(metadata, version),
        describes=_describes(metadata),
    )


def _describes(metadata: Given) -> dict[str, Any]:
    """What is said of the model and data; what this reader uses is of the type it must be."""
    found = {name: metadata[name] for name in _DESCRIBES if metadata.get(name) is not None}
    for name in ("hook_name", "hook_name_out", "model_name", "model_class_name"):
        if name in found:
            metadata.text(name)
    if "context_size" in found:
        metadata.count("context_size")
    if "prepend_bos" in found:
        metadata.flag("prepend_bos")
    if "held_out" in found:
        held_out = metadata.table("held_out")
        for name in held_out:
            if held_out[name] is not None and name in ("l0", "fvu", "ce_recovered"):
                held_out.number(name)
    return found


def _k(given: Given) -> int:
    if given.get("k") is None:
        raise ArtefactError("k is missing", where=given.where)
    return given.count("k")


def _processing(metadata: Given, version: tuple[int, ...]) -> tuple[str, ...]:
    """What TransformerLens did to the weights of the model that an SAE was trained on."""
    asked = metadata.table("model_from_pretrained_kwargs")
    lens = metadata.get("model_class_name") in (None, "HookedTransformer")
    always = lens and version < PROCESSED_BEFORE and metadata.get("model_name") is not None
    defaults = {"center_writing_weights", "fold_ln", "fold_value_biases"} if always else set()
    return tuple(name for name in PROCESSING if asked.flag(name, default=name in defaults))


def input_scale_of(config: SaelensConfig, folder: Path, given: float | None) -> float:
    """The factor still to be folded into the weights; InputError if it is not known."""
    if config.normalisation == "layer_norm":
        return math.sqrt((config.d_in - 1) / config.d_in) * (given or 1.0)
    if config.normalisation == "none" or given is not None:
        return given or 1.0
    path = folder / "activation_scaler.json"
    stored = Given.read(path) if path.exists() else Given({}, str(path))
    if stored.get("scaling_factor") is None:
        raise InputError(NOT_FOLDED, where=str(folder))
    scale = stored.number("scaling_factor")
    if scale <= 0:
        raise ArtefactError("scaling_factor is not above 0", where=str(path), given=scale)
    return scale
