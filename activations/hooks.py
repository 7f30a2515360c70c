"""From site names to plain forward hooks on the Hugging Face module, for reading and for splicing.

TransformerLens' architecture adapters know which submodule of which architecture is "the attention
output projection of block N"; only that knowledge is used here. The model itself stays the one that
Hugging Face built (scaled-dot-product attention, no wrapper), which is faster than the bridge.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from activations import sites as vocabulary
from saescope.errors import InputError

EditFunction = Callable[[Tensor, Tensor], Tensor | None]
_SIDES = {"hook_in": "input", "hook_out": "output"}


@dataclass(frozen=True, kw_only=True)
class HookTarget:
    """Where a site is in the module tree: a module, its input or output, perhaps some columns."""

    site: str
    module: nn.Module
    side: str
    columns: Tensor | None = None
    """The columns of a joint query-key-value projection's output that belong to this site."""
    in_place: bool = False
    """A residual connection keeps the same tensor, so an edit must change the tensor itself."""

    def read(self, value: Tensor) -> Tensor:
        """The site's part [batch, position, d_in] of the module's input or output."""
        if value.ndim != 3:
            raise InputError(
                "is not an activation of shape [batch, position, width]", where=self.site,
                given=tuple(value.shape),
            )  # fmt: skip
        return value if self.columns is None else value[..., self.columns]

    def write(self, value: Tensor, edited: Tensor) -> Tensor:
        """The module's input or output with the site's part replaced."""
        if self.columns is not None:
            value = value.clone()
            value[..., self.columns] = edited
            return value
        return value.copy_(edited) if self.in_place else edited


class SiteMap:
    """All the sites of one model: their names, and the module behind each.

    Raises InputError if TransformerLens does not know the architecture.
    """

    def __init__(self, hf: nn.Module, name: str) -> None:
        self._hf = hf
        self.adapter = _adapter(hf, name)
        self._where = name
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
        self._known = frozenset(self.names)

    def _list_names(self) -> list[str]:
        """Every named hook that a module boundary of this model gives, in the model's order."""
        block = self._components["blocks"]
        hooks = list(block.hook_aliases)
        for name, component in block.submodules.items():
            hooks += [f"{name}.{alias}" for alias in getattr(component, "hook_aliases", {})]
        names = ["hook_embed", *(f"blocks.{n}.{h}" for n in range(self.n_layers) for h in hooks)]
        return [name for name in names if self._find(name) is not None]

    def target(self, site: str) -> HookTarget:
        """The module behind a site. Raises InputError that names the nearest sites there are."""
        found = self._find(site)
        if found is None:
            raise vocabulary.unknown_site(site, self.names, where=self._where)
        return found

    def _find(self, site: str) -> HookTarget | None:
        if site.startswith(vocabulary.MODULE_PREFIX):
            path, _, side = site.removeprefix(vocabulary.MODULE_PREFIX).rpartition(":")
            module = _submodule(self._hf, path)
            if module is None or side not in _SIDES.values():
                return None
            return HookTarget(site=site, module=module, side=side)
        if site == "hook_embed":
            return self._descend(site, ["embed", "hook_out"], self._components, self._hf)
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


class _AllFound(Exception):
    """No error: ends the forward pass in the last hook that was waited for."""


def _hook(target: HookTarget, see: Callable[[Tensor], Tensor | None]) -> Any:
    """Register `see` on a target; what it returns (unless None) replaces the activation."""
    if target.side == "input":

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            value = args[0] if args else kwargs["hidden_states"]
            new = see(value)
            if new is None:
                return None
            if args:
                return (new, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": new}

        return target.module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        new = see(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return target.module.register_forward_hook(after)


def run_until_captured(
    targets: Sequence[HookTarget], run: Callable[[], object]
) -> dict[str, Tensor]:
    """Run a forward pass, keep each target's activation, and stop once all have been seen.

    Raises InputError for a site whose module this model's forward pass never calls.
    """
    found: dict[str, Tensor] = {}

    def seeing(target: HookTarget) -> Callable[[Tensor], None]:
        def see(value: Tensor) -> None:
            read = target.read(value)
            # an edit at this site later in the pass would change this very tensor
            found[target.site] = read.clone() if target.in_place else read
            if len(found) == len(wanted):
                raise _AllFound

        return see

    wanted = {target.site: target for target in targets}
    handles = [_hook(target, seeing(target)) for target in wanted.values()]
    try:
        run()
    except _AllFound:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [site for site in wanted if site not in found]
    if missing:
        raise InputError("this model's forward pass never reaches the site", where=missing[0])
    return found


@contextmanager
def splicing(base: nn.Module, edits: Sequence[tuple[HookTarget, EditFunction]]) -> Iterator[None]:
    """Replace activations while the context lasts; see `Model.edit`."""
    first_position = 0

    def count_cached(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
        nonlocal first_position
        past = kwargs.get("past_key_values")
        length = getattr(past, "get_seq_length", None)
        first_position = int(length()) if length is not None else 0

    def seeing(target: HookTarget, function: EditFunction) -> Callable[[Tensor], Tensor | None]:
        def see(value: Tensor) -> Tensor | None:
            x = target.read(value)
            if target.in_place and x.requires_grad:
                x = x.clone()  # autograd may need what the function saw, and the value changes
            last = first_position + x.shape[1]
            new = function(x, torch.arange(first_position, last, device=x.device))
            if new is None:
                return None
            if new.shape != x.shape:
                raise InputError(
                    "an edit must return the shape it was given", where=target.site,
                    given=tuple(new.shape), allowed=str(tuple(x.shape)),
                )  # fmt: skip
            return target.write(value, new.to(x.dtype))

        return see

    handles = [base.register_forward_pre_hook(count_cached, with_kwargs=True)]
    try:
        handles += [_hook(target, seeing(target, function)) for target, function in edits]
        yield
    finally:
        for handle in handles:
            handle.remove()
