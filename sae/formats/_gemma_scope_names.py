"""What a Gemma Scope SAE is and where: from its config.json, else from its released name.

    gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82           Gemma Scope 1, no config.json
    gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6
    gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_small       Gemma Scope 2

Gemma Scope 1's transcoders read what comes just after the norm before the MLP, its gain folded into
the MLP's own weights (Lieberum et al. 2024, appendix on technical details; the release's README):
the norm's output divided by its gain, TransformerLens' ln2.hook_normalized. They write what the MLP
adds to the residual stream, after the norm behind it. Gemma Scope 2's read that norm's output, gain
and all.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sae.formats._given import Given
from saescope.errors import InputError

_FIRST = re.compile(
    r"(?:.*/)?gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)"
    r"/(?:layer_(\d{1,3})|(embedding))(?:/width_\d+[km])?/average_l0_\d+"
)
_SECOND = re.compile(
    r"(?:.*/)?gemma-scope-2-(\d+[bm])-(pt|it)/(resid_post|attn_out|mlp_out|transcoder)(?:_all)?"
    r"/layer_(\d{1,3})_width_\w+"
)
_FIRST_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_SECOND_POINTS = {
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
_IN_LAYER = {
    "input": "hook_resid_pre",
    "output": "hook_resid_post",
    "input_layernorm.output": "ln1.hook_out",
    "self_attn.o_proj.input": "attn.hook_z",
    "self_attn.o_proj.output": "attn.hook_out",
    "self_attn.output": "attn.hook_out",
    "post_attention_layernorm.output": "hook_attn_out",
    "pre_feedforward_layernorm.output": "ln2.hook_out",
    "mlp.input": "mlp.hook_in",
    "mlp.output": "mlp.hook_out",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""Points of a Gemma 3 layer (modules of the Hugging Face model) and their names here"""
_ALONE = {"model.embed_tokens.output": "hook_embed", "model.norm.output": "ln_final.hook_out"}
_POINT = re.compile(r"model\.layers\.(\d{1,3})\.([a-z_.]+)")
_MODULE = re.compile(r"([\w.]+)\.(input|output)")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What names and config.json tell; None where they do not."""

    transcodes: bool | None = None
    site: str | None = None
    target_site: str | None = None
    model: str | None = None
    embedding: bool = False
    points: dict[str, str] | None = None
    """hook points as config.json has them"""

    def metadata(self) -> dict[str, Any]:
        """For an SAE's metadata."""
        found = {
            "site": self.site,
            "target_site": self.target_site if self.transcodes else None,
            "model": self.model,
            "prepend_bos": True,
            "kind_unstated": True if self.transcodes is None else None,
            **(self.points or {}),
        }
        return {name: value for name, value in found.items() if value is not None}


def facts_of(given: Given, name: PurePosixPath) -> Facts:
    """What a config.json says (it wins), and what the name in the release does.

    Raises InputError for a kind of dictionary that saescope has not.
    """
    named = _named(name.as_posix())
    points = {
        key: given.text(key)
        for key in ("hf_hook_point_in", "hf_hook_point_out")
        if given.get(key) is not None
    }
    read, written = points.get("hf_hook_point_in"), points.get("hf_hook_point_out")
    transcodes = kind_of_config(given)
    if transcodes is None and read and written:
        transcodes = read != written
    if transcodes is None:
        transcodes = named.transcodes
    model = given.text("model_name") if given.get("model_name") is not None else None
    return Facts(
        transcodes=transcodes,
        site=site_of(read) if read else named.site,
        target_site=site_of(written) if written else named.target_site,
        model=_hub_name(model) if model else named.model,
        embedding=named.embedding,
        points=points,
    )


def kind_of_config(given: Given) -> bool | None:
    """Whether a config.json is a transcoder's; None if it does not say.

    Raises InputError for kinds and architectures that are not one layer's JumpReLU.
    """
    architecture = given.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise InputError(
            "an architecture that Gemma Scope's files do not have",
            where=given.where,
            given=architecture,
            allowed="jump_relu",
        )
    kind = given.get("type")
    if kind not in (None, "sae", "transcoder"):
        raise InputError(
            "a kind of dictionary that saescope does not read",
            where=given.where,
            given=kind,
            allowed=("sae", "transcoder"),
        )
    return None if kind is None else kind == "transcoder"


def site_of(point: str) -> str:
    """The site of a hook point of Gemma 3's modules; any other by its module's path.

    >>> site_of("model.layers.7.pre_feedforward_layernorm.output")
    'blocks.7.ln2.hook_out'
    >>> site_of("model.layers.7.mlp.gate_proj.output")
    'module:model.layers.7.mlp.gate_proj:output'
    """
    if point in _ALONE:
        return _ALONE[point]
    layer = _POINT.fullmatch(point)
    if layer and layer[2] in _IN_LAYER:
        return f"blocks.{int(layer[1])}.{_IN_LAYER[layer[2]]}"
    module = _MODULE.fullmatch(point)
    if module is None:
        raise InputError(
            "not a point of a model",
            where="hook point",
            given=point,
            allowed="MODULE.input, MODULE.output",
        )
    return f"module:{module[1]}:{module[2]}"


def _named(name: str) -> Facts:
    first, second = _FIRST.fullmatch(name), _SECOND.fullmatch(name)
    if first:
        size, tuned, release, layer, embedding = first.groups()
        model = f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}"
        if embedding:
            # the embedding is scaled only in the release of the residual stream
            return Facts(
                transcodes=False, site="hook_embed", model=model, embedding=release == "res"
            )
        if release == "transcoders":
            return Facts(
                transcodes=True,
                site=f"blocks.{layer}.ln2.hook_normalized",
                target_site=f"blocks.{layer}.hook_mlp_out",
                model=model,
            )
        return Facts(transcodes=False, site=f"blocks.{layer}.{_FIRST_SITES[release]}", model=model)
    if second:
        size, tuned, release, layer = second.groups()
        read, written = (
            site_of(f"model.layers.{layer}.{point}") if point else None
            for point in _SECOND_POINTS[release]
        )
        return Facts(
            transcodes=written is not None,
            site=read,
            target_site=written,
            model=_hub_name(f"gemma-3-{size}-{tuned}"),
        )
    return Facts()


def _hub_name(model: str) -> str:
    """The model's name on the hub; some files have gemma-v3-1b-pt, and 270m has no -pt there.

    >>> _hub_name("gemma-v3-1b-pt"), _hub_name("google/gemma-3-270m-pt")
    ('google/gemma-3-1b-pt', 'google/gemma-3-270m')
    """
    found = re.fullmatch(r"(?:google/)?gemma-v?(\d)-(\w+?)(-pt|-it)?", model)
    if not found:
        return model
    tuned = "" if found[2] == "270m" and found[3] == "-pt" else found[3] or ""
    return f"google/gemma-{found[1]}-{found[2]}{tuned}"
