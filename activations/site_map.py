"""From site names to modules: the sites of one model.

TransformerLens' architecture adapters know which submodule of which architecture is "the attention
output projection of block N"; only that knowledge is used here. The model itself stays the one that
Hugging Face built (scaled-dot-product attention, no wrapper), which is faster than the bridge.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from activations import sites as vocabulary
from activations.hooks import HookTarget
from activations.normalised import normalised_target
from saescope.errors import InputError

_SIDES = {"hook_in": "input", "hook_out": "output"}


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
                chosen += vocabulary.select([site], self._like(site), where=self._where)
            else:
                chosen.append(self.target(site).site)
        return list(dict.fromkeys(chosen))

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
                "this architecture has no list of transformer blocks", where=name,
                given=type(hf).__name__,
            )  # fmt: skip
        self.n_layers = len(layers)
        self.names = self._list_names()

    def _list_names(self) -> list[str]:
        """Every named hook that a module boundary of this model gives, in the model's order."""
        block = self._components["blocks"]
        hooks = list(block.hook_aliases)
        for name, component in block.submodules.items():
            hooks += [f"{name}.hook_out"] if name.startswith("ln") else []
            hooks += ["mlp.hook_in"] if name == "mlp" else []
            hooks += [f"{name}.{alias}" for alias in getattr(component, "hook_aliases", {})]
        names = ["hook_embed", "hook_pos_embed"]
        names += [f"blocks.{n}.{hook}" for n in range(self.n_layers) for hook in hooks]
        return [name for name in (*names, "ln_final.hook_out") if self._find(name) is not None]

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
        return self._follow(site, hook.split("."), block, module)

    def _descend(
        self, site: str, path: Sequence[str], components: Mapping[str, Any], module: nn.Module
    ) -> HookTarget | None:
        """Go into the component that the path's first part names."""
        component = components.get(path[0])
        if component is None or len(path) < 2:
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
            if path[0] == "hook_normalized":
                return normalised_target(site, module)
            side = _SIDES.get(path[0])
            if side is None:
                return None
            mid = site.endswith(".hook_resid_mid")
            return HookTarget(site=site, module=module, side=side, in_place=mid)
        if path[0] in ("q", "k", "v") and hasattr(component, "split_qkv_matrix"):
            return _joint_target(site, path, component, module)
        return self._descend(site, path, component.submodules, module)


def _adapter(hf: nn.Module, name: str) -> Any:
    """TransformerLens' adapter for this architecture: a table, no change to the model."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import build_bridge_config_from_hf

    architecture = type(hf).__name__
    config = build_bridge_config_from_hf(hf.config, architecture, name, torch.float32)
    try:
        return ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ValueError as error:
        raise InputError(
            "TransformerLens has no adapter for this architecture", where=name, given=architecture
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
    parts = dict(zip("qkv", component.split_qkv_matrix(stand_in), strict=True))
    columns = parts[path[0]].weight[:, 0].detach().long()
    return HookTarget(site=site, module=joint, side="output", columns=columns)
