"""From site names to modules: the sites of one model.

TransformerLens' architecture adapters know which submodule of which architecture is "the attention
output projection of block N"; only that knowledge is used here. The model itself stays the one that
Hugging Face built (scaled-dot-product attention, no wrapper), which is faster than the bridge.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from activations.sites import names as vocabulary
from activations.sites.hf_facts import d_vocab
from activations.sites.hooks import HookTarget
from activations.sites.normalised import normalised_target
from activations.sites.probe import Readable, readable
from saescope.errors import InputError

_SIDES = {"hook_in": "input", "hook_out": "output"}
_BEFORE_GAIN = "hook_normalized"
_OF_PARTS = {"hook_in": ("in", "gate", "qkv", "q"), "hook_out": ("out", "o")}
"""The parts that a component's input and output are, where it is no module."""
_ELSEWHERE = {
    "hook_attn_out": ("attn.o.hook_out", "attn.hook_out"),
    "hook_mlp_out": ("mlp.out.hook_out", "mlp.hook_out"),
    "hook_resid_mid": ("ln2.hook_in", "ln1.hook_out", "mlp.hook_in"),
}
"""Where else than TransformerLens says a part of the residual stream may be."""


class ModuleSites:
    """The sites of any PyTorch model: its modules by their paths."""

    names: Sequence[str] = ()
    """Every named site, in the model's order."""

    def __init__(self, hf: nn.Module, name: str) -> None:
        self._hf = hf
        self._where = name

    def target(self, site: str) -> HookTarget:
        """The module behind a site. Raises InputError that names the nearest sites there are."""
        found = self._find(site)
        if found is None:
            raise vocabulary.unknown_site(site, self._like(site), where=self._where)
        return found

    def resolve(self, sites: Sequence[str]) -> list[str]:
        """The full names that names, short names and patterns stand for, each once.

        Raises InputError for a site this model does not have, naming the nearest that it has.
        """
        chosen: list[str] = []
        for site in map(vocabulary.full_name, sites):
            if self._find(site) is None and vocabulary.is_pattern(site):
                chosen += self._matching(site)
            else:
                chosen.append(self.target(site).site)
        return list(dict.fromkeys(chosen))

    def _matching(self, pattern: str) -> list[str]:
        """The sites that a full pattern stands for; those before a norm's gain are not listed, but
        every norm whose output matches has one, or an error."""
        before_gain = pattern.endswith(f".{_BEFORE_GAIN}")
        listed = f"{pattern.removesuffix(_BEFORE_GAIN)}hook_out" if before_gain else pattern
        found = vocabulary.select([listed], self._like(listed), where=self._where)
        if not before_gain:
            return found
        named = [f"{site.removesuffix('hook_out')}{_BEFORE_GAIN}" for site in found]
        return [self.target(site).site for site in named]

    def _like(self, site: str) -> Sequence[str]:
        """The names among which one like this is to be found."""
        if self.names and not site.startswith(vocabulary.MODULE_PREFIX):
            return self.names
        side = vocabulary.module_and_side(site)[1]
        side = side if side in vocabulary.SIDES else vocabulary.SIDES[1]
        paths = [path for path, _ in self._hf.named_modules() if path]
        return [f"{vocabulary.MODULE_PREFIX}{path}:{side}" for path in paths]

    def _find(self, site: str) -> HookTarget | None:
        if not site.startswith(vocabulary.MODULE_PREFIX):
            return None
        path, side = vocabulary.module_and_side(site)
        module = _submodule(self._hf, path)
        if module is None or side not in vocabulary.SIDES:
            return None
        return HookTarget(site=site, module=module, side=side, raw=True)


class SiteMap(ModuleSites):
    """All the sites of one language model: their names, and the module behind each.

    Raises InputError if TransformerLens does not know the architecture.
    """

    def __init__(self, hf: nn.Module, name: str) -> None:
        super().__init__(hf, name)
        self.adapter = _adapter(hf, name)
        self._components: Mapping[str, Any] = self.adapter.get_component_mapping()
        blocks = self._components.get("blocks")
        layers = _submodule(hf, getattr(blocks, "name", None))
        if not isinstance(layers, nn.ModuleList | nn.Sequential):
            raise InputError(
                "this architecture has no list of transformer blocks",
                where=name,
                given=type(hf).__name__,
            )
        self.n_layers = len(layers)

    @cached_property
    def names(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Every named site that can be read, in the model's order."""
        return list(self.readable.targets)

    @cached_property
    def readable(self) -> Readable:
        """Which named sites there are, found out by a small forward pass."""
        hf: Any = self._hf
        device = next(p.device for p in hf.parameters() if p.device.type != "meta")

        def run(tokens: torch.Tensor) -> object:
            return hf.base_model(input_ids=tokens.to(device), use_cache=False)

        layers = range(self.n_layers)
        return readable(self._candidates(), [self._norms(n) for n in layers], run, d_vocab(hf))

    def target(self, site: str) -> HookTarget:
        """The module behind a site. Raises InputError that names the nearest sites there are."""
        known = self.readable if not site.startswith(vocabulary.MODULE_PREFIX) else None
        if known is not None and site in known.targets:
            return known.targets[site]
        if known is not None and site in known.refused:
            raise InputError(
                f"this model has no such site: {known.refused[site]}",
                where=self._where,
                given=site,
            )
        return super().target(site)

    def _candidates(self) -> dict[str, list[HookTarget]]:
        """Of every named hook that a module boundary of this model gives, what it may be."""
        block = self._components["blocks"]
        hooks = list(dict.fromkeys([*block.hook_aliases, *_ELSEWHERE]))
        for name, component in block.submodules.items():
            hooks += [f"{name}.hook_out"] if name.startswith("ln") else []
            hooks += ["mlp.hook_in"] if name == "mlp" else []
            hooks += [f"{name}.{alias}" for alias in getattr(component, "hook_aliases", {})]
        names = ["hook_embed", "hook_pos_embed"]
        names += [f"blocks.{n}.{hook}" for n in range(self.n_layers) for hook in hooks]
        found = {}
        for site in (*names, "ln_final.hook_out"):
            likely = [self._find(site), *self._others(site)]
            # embeddings that are projected to the stream's width are in it after that
            ordered = reversed(likely) if site == "hook_embed" else likely
            targets = [target for target in ordered if target is not None]
            if targets:
                found[site] = targets
        return found

    def _others(self, site: str) -> list[HookTarget | None]:
        """What else a part of the residual stream may be, in some variants of an architecture."""
        block, _, name = site.rpartition(".")
        if site == "hook_embed":
            path = self._components["embed"].name.rpartition(".")[0]
            inner = _submodule(self._hf, f"{path}.project_in" if path else "project_in")
            found = None if inner is None else HookTarget(site=site, module=inner, side="output")
            return [found]
        paths = _ELSEWHERE.get(name, ())
        found = [self._find(f"{block}.{path}") for path in paths]
        scale = self._scale(site)
        return [None if each is None else replace(each, site=site, scale=scale) for each in found]

    def _scale(self, site: str) -> float:
        """What the model multiplies a module's output by before it is part of the stream."""
        if site == "hook_embed":
            return float(getattr(self._components["embed"], "_output_contribution_scale", 1.0))
        if site.endswith((".hook_attn_out", ".hook_mlp_out")):
            return float(getattr(self._components["blocks"], "residual_contribution_scale", 1.0))
        return 1.0

    def _norms(self, layer: int) -> tuple[nn.Module | None, nn.Module | None]:
        """The modules of a block's two norms."""
        found = [self._find(f"blocks.{layer}.{name}.hook_out") for name in ("ln1", "ln2")]
        first, second = (None if each is None else each.module for each in found)
        return first, second

    def _find(self, site: str) -> HookTarget | None:
        if site.startswith(vocabulary.MODULE_PREFIX):
            return super()._find(site)
        if site in ("hook_embed", "hook_pos_embed"):
            name = site.removeprefix("hook_")
            return self._descend(site, [name, "hook_out"], self._components, self._hf)
        first, _, rest = site.partition(".")
        if first != "blocks":
            return self._descend(site, site.split("."), self._components, self._hf)
        layer, _, hook = rest.partition(".")
        layers = _submodule(self._hf, self._components["blocks"].name)
        if not (layer.isdigit() and int(layer) < self.n_layers and isinstance(layers, nn.Module)):
            return None
        block = self._components["blocks"]
        module = layers.get_submodule(str(int(layer)))
        found = self._follow(site, hook.split("."), block, module)
        is_q = found is not None and hook == "attn.hook_q" and found.columns is None
        return self._without_gate(found, f"blocks.{layer}") if found and is_q else found

    def _without_gate(self, q: HookTarget, block: str) -> HookTarget | None:
        """The queries alone, where their projection makes a gate of the same width beside each
        head's (Qwen3-Next and its successors); None where it is unknown what else it makes."""
        out, attention = (
            self._find(f"{block}.attn.o.hook_out"),
            self._find(f"{block}.attn.hook_out"),
        )
        width = getattr(getattr(out, "module", None), "in_features", None)
        made = getattr(q.module, "out_features", None)
        if width is None or made is None or made != 2 * width or attention is None:
            return q
        size = getattr(attention.module, "head_dim", None)
        if size is None or not type(attention.module).__name__.startswith("Qwen"):
            return None
        columns = torch.arange(made).view(-1, 2, size)[:, 0].flatten()
        return replace(q, columns=columns)

    def _descend(
        self, site: str, path: Sequence[str], components: Mapping[str, Any], module: nn.Module
    ) -> HookTarget | None:
        """Go into the component that the path's first part names."""
        component = components.get(path[0])
        if component is None or len(path) < 2:
            return None
        if component.name is None and path[1] in _OF_PARTS and len(path) == 2:
            # no module of its own: its first part's input, its last part's output
            parts = [name for name in _OF_PARTS[path[1]] if name in component.submodules]
            path = [path[0], *parts[:1], path[1]]
            if not parts:
                return None
        inner = _submodule(module, component.name)
        if inner is None:
            return None
        return self._follow(site, path[1:], component, inner)

    def _follow(
        self, site: str, path: Sequence[str], component: Any, module: nn.Module
    ) -> HookTarget | None:
        """Resolve a hook relative to a component, through its aliases."""
        alias = getattr(component, "hook_aliases", {}).get(path[0]) if len(path) == 1 else None
        if isinstance(alias, str):
            path = alias.split(".")
        if len(path) == 1:
            if path[0] == _BEFORE_GAIN:
                return normalised_target(site, module)
            side = _SIDES.get(path[0])
            if side is None:
                return None
            # the same tensor goes on beside the module that reads it
            mid = site.endswith(".hook_resid_mid") and side == "input"
            scale = self._scale(site)
            return HookTarget(site=site, module=module, side=side, in_place=mid, scale=scale)
        if path[0] in ("q", "k", "v") and hasattr(component, "split_qkv_matrix"):
            return _joint_target(site, path, component, module)
        return self._descend(site, path, component.submodules, module)


def _adapter(hf: nn.Module, name: str) -> Any:
    """TransformerLens' adapter for this architecture: a table, no change to the model."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import build_bridge_config_from_hf

    architecture = type(hf).__name__
    try:
        config = build_bridge_config_from_hf(hf.config, architecture, name, torch.float32)
        return ArchitectureAdapterFactory.select_architecture_adapter(config)
    except Exception as error:  # each adapter reads what it wants to of the configuration
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"TransformerLens has no adapter for this architecture ({reason[:200]})",
            where=name,
            given=architecture,
        ) from error


def _submodule(module: nn.Module, path: str | None) -> nn.Module | None:
    """The submodule at a dotted path; the module itself for a component without a container."""
    if path is None:
        return module
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _joint_target(
    site: str, path: Sequence[str], component: Any, attention: nn.Module
) -> HookTarget | None:
    """Query, key or value of a joint projection: its output, and which columns of it.

    The adapter knows how to split the projection's weight. Split by it, a weight that holds each
    output's own number tells which outputs are the query's, contiguous or interleaved by head.
    """
    name = component.submodules["qkv"].name if "qkv" in component.submodules else None
    joint = _submodule(attention, name) if name else None
    if joint is None or _SIDES.get(path[-1]) != "output" or len(path) != 2:
        return None
    weight: Any = joint.weight
    if getattr(attention, "new_decoder_architecture", False):
        columns = _columns_of_groups(attention, len(weight))[path[0]]
        return HookTarget(site=site, module=joint, side="output", columns=columns)
    transposed = type(joint).__name__ == "Conv1D"  # GPT-2 keeps [in, out], nn.Linear [out, in]
    n_out = weight.shape[1 if transposed else 0]
    numbers = torch.arange(n_out, dtype=torch.float32)
    numbered = nn.Module()
    numbered.weight = nn.Parameter(
        numbers.expand(weight.shape) if transposed else numbers[:, None].expand(weight.shape)
    )
    numbered.bias = nn.Parameter(numbers.clone())
    stand_in = copy.copy(attention)
    object.__setattr__(stand_in, "_modules", {**attention._modules, name: numbered})
    try:
        parts = dict(zip("qkv", component.split_qkv_matrix(stand_in), strict=True))
    except (RuntimeError, AttributeError, TypeError, ValueError, AssertionError):
        return None  # a layout that the adapter does not know
    columns = parts[path[0]].weight[:, 0].detach().long()
    return HookTarget(site=site, module=joint, side="output", columns=columns)


def _columns_of_groups(attention: Any, n_out: int) -> dict[str, torch.Tensor]:
    """Columns of Falcon's newer joint projection: each group has its queries, one key, one value.

    As `FalconAttention._split_heads` reads it.
    """
    groups, size = int(attention.num_kv_heads), int(attention.head_dim)
    columns = torch.arange(n_out).view(groups, -1, size)
    parts = {"q": columns[:, :-2], "k": columns[:, -2], "v": columns[:, -1]}
    return {name: part.flatten() for name, part in parts.items()}
