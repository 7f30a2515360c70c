"""Temporal SAEs of SAELens (architecture "temporal"), which read sequences and not rows."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sae.analysis.predictive import PredictiveConfig, PredictiveSAE
from sae.formats._given import Given
from sae.formats._weights import Weights
from sae.formats.hub import SCHEME, HubFolder, fetch
from sae.formats.remote import copied
from sae.formats.saelens import CONFIG, WEIGHTS
from saescope.errors import ArtefactError, InputError
from saescope.paths import AnyPath, as_path
from saescope.system import system_errors

_COUNTS = ("d_in", "d_sae", "n_heads", "n_attn_layers", "bottleneck_factor")
_COMMON = "architecture dtype device apply_b_dec_to_input normalize_activations metadata"
_OWN = "sae_diff_type kval_topk tied_weights activation_normalization_factor reshape_activations"
_KNOWN = {*_COUNTS, *_COMMON.split(), *_OWN.split()}


@system_errors()
def load_predictive(path: str | AnyPath) -> PredictiveSAE:
    """The temporal SAE in a folder that SAELens wrote, in evaluation mode, on the CPU.

    The folder may be a URL, or hf://owner/repo[/folder][@revision], as for `sae.load`.

    Raises ArtefactError if there is none or its files are damaged, InputError for another
    architecture, or options that are not known here.

    >>> analysis = load_predictive("hf://me/temporal-saes/layer_12")  # doctest: +SKIP
    >>> analysis(model.capture(tokens, [site])[site]).novel.shape  # doctest: +SKIP
    torch.Size([1, 20, 9216])
    """
    name = str(path)
    with ExitStack() as stack:
        hub = HubFolder.parse(name) if name.startswith(SCHEME) else None
        here = fetch(hub)[0] if hub else as_path(name)
        if not isinstance(here, Path):
            here = stack.enter_context(copied(here, ""))
        if not here.is_dir():
            raise ArtefactError("no SAE here", where=name)
        given = Given.read(here / CONFIG)
        sae = PredictiveSAE(_config(given))
        _fill(sae, Weights.safetensors(here / WEIGHTS))
    metadata = given.table("metadata")
    names = {"site": "hook_name", "model": "model_name", "context": "context_size"}
    said = {ours: metadata.get(theirs) for ours, theirs in names.items()}
    sae.metadata = {"format": "saelens", **{k: v for k, v in said.items() if v is not None}}
    return sae.eval().requires_grad_(requires_grad=False)


def _config(given: Given) -> PredictiveConfig:
    if given["architecture"] != "temporal":
        raise InputError(
            "is no temporal SAE of SAELens; sae.load reads others",
            where=given.where,
            given=given["architecture"],
            allowed="temporal",
        )
    given.refuse_unknown(_KNOWN, sorted(_KNOWN))
    kind, normalised = given.get("sae_diff_type", "topk"), given.get("normalize_activations")
    for name, value, allowed in (
        ("sae_diff_type", kind, ("topk", "relu")),
        ("normalize_activations", normalised, (None, "none", "constant_scalar_rescale")),
        ("reshape_activations", given.get("reshape_activations"), (None, "none")),
    ):
        if value not in allowed:
            raise InputError(
                f"{name} that saescope has not", where=given.where, given=value, allowed=allowed
            )
    scale = "activation_normalization_factor"
    scaled = normalised == "constant_scalar_rescale" and scale in given
    options: dict[str, Any] = {name: given.count(name) for name in _COUNTS if name in given}
    if kind == "topk" and given.get("kval_topk") is not None:
        options["kval_topk"] = given.count("kval_topk")
    return PredictiveConfig(
        **options,
        tied_weights=given.flag("tied_weights", default=True),
        apply_b_dec_to_input=given.flag("apply_b_dec_to_input", default=True),
        scale=given.number(scale) if scaled else 1.0,
    )


def _fill(sae: PredictiveSAE, weights: Weights) -> None:
    """Every parameter from its tensor. ArtefactError if one is missing, or of another shape."""
    for name, parameter in sae.named_parameters():
        parameter.data = weights.take(name, tuple(parameter.shape))
    if weights.left:
        raise InputError(
            "has tensors that no temporal SAE has", where=weights.where, given=sorted(weights.left)
        )
