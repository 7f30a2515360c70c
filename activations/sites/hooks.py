"""Plain forward hooks at sites, for reading and for splicing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from activations.sites.grids import GridRun
from activations.sites.kept import Run, TokenPositions
from saescope.errors import InputError

EditFunction = Callable[[Tensor, Tensor], Tensor | None]
"""an activation [batch, position, d_in] and its positions, to what replaces it"""
PositionedEdit = Callable[[Tensor, TokenPositions], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class HookTarget:
    """Where a site is in the module tree: a module, its input or output, perhaps some columns."""

    site: str
    module: nn.Module
    side: str
    """input, output, or update: output - input."""
    columns: Tensor | None = None
    """The columns of a joint query-key-value projection's output that belong to this site."""
    in_place: bool = False
    """A residual connection keeps the same tensor, so an edit must change the tensor itself."""
    scale: float = 1.0
    """What the model multiplies the module's output by before it adds it to the residual stream."""
    raw: bool = False
    """A module by its path: of any shape with a batch, and perhaps changed in place later on."""

    def read(self, value: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The site's part [batch, position, d_in] of the module's input, output or update.

        Args: shape is the [batch, position] of the run's tokens, where it has tokens: some modules
        see them in one row.
        """
        if shape is not None and value.ndim == 2 and len(value) == shape[0] * shape[1]:
            value = value.view(*shape, -1)
        if shape is not None and value.ndim == 3 and len(value) == 1 != shape[0]:
            value = value.expand(shape[0], -1, -1)  # embeddings of positions, for all rows
        if self.raw and value.ndim == 2:
            return value[:, None]
        if self.raw and value.ndim == 4:
            return value.flatten(2).transpose(1, 2)
        if value.ndim != 3:
            shapes = "[batch, position, width]"
            if self.raw:
                shapes += ", [batch, width] or [batch, channel, height, width]"
            raise InputError(
                f"is not an activation of shape {shapes}", where=self.site, given=tuple(value.shape)
            )
        value = value if self.columns is None else value[..., self.columns]
        return value if self.scale == 1 else value * self.scale

    def keep(self, value: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """`read`, safe from what is changed in place later on: by an edit, a module, a sum."""
        read = self.read(value, shape)
        copied = self.columns is not None or self.scale != 1
        return read if copied else read.clone()

    def write(self, value: Tensor, edited: Tensor) -> Tensor:
        """The module's input, output or update with the site's part replaced."""
        if self.scale != 1:
            own = value.reshape(edited.shape)
            # what is left alone keeps its bits, which a product and a division would not
            edited = own.where(edited == own * self.scale, edited / self.scale)
        if self.in_place:
            return value.copy_(edited.reshape(value.shape))
        if value.ndim == 2 and self.columns is None:
            return edited.reshape(value.shape)
        if value.ndim == 4:
            return edited.transpose(1, 2).reshape(value.shape)
        if self.columns is not None:
            # one row of tokens, where the module sees them so, or one for all sequences
            whole = value.clone() if value.ndim == 2 else value.expand(len(edited), -1, -1).clone()
            whole[..., self.columns] = edited.reshape(*whole.shape[:-1], -1)
            return whole
        return edited


class _AllFound(Exception):
    """No error: ends the forward pass in the last hook that was waited for."""


def _input_of(site: str, args: tuple, kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor]:
    """A module's first input, and where it stands among the arguments."""
    named = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    slot = 0 if args else "hidden_states" if "hidden_states" in kwargs else None
    if slot is None and len(named) == 1:
        slot = named[0]
    value = None if slot is None else args[0] if slot == 0 else kwargs[str(slot)]
    if slot is None or not isinstance(value, Tensor):
        raise InputError(
            "this module is not called with one tensor first; use the input or output of another",
            where=site,
            given=[type(value).__name__ for value in args] + list(kwargs),
        )
    return slot, value


def _output_of(site: str, output: Any) -> tuple[int | str | None, Tensor]:
    """A module's output, or the first of several, and where it stands among them."""
    slot = None
    if isinstance(output, Mapping) and output:
        slot = next(iter(output))
    elif isinstance(output, tuple | list) and output:
        slot = 0
    value = output if slot is None else output[slot]
    if not isinstance(value, Tensor):
        raise InputError("its output is not a tensor", where=site, given=type(value).__name__)
    return slot, value


def _with_output(output: Any, slot: int | str | None, new: Tensor) -> Any:
    """A module's output with the tensor in this slot replaced."""
    if slot is None:
        return new
    if isinstance(output, Mapping):
        kind: Any = type(output)
        return kind({**output, slot: new})
    return type(output)([new, *output[1:]])


_OFF: ContextVar[bool] = ContextVar("off", default=False)


@contextmanager
def no_hooks() -> Iterator[None]:
    """Within the block, no hook made here reads or replaces an activation."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def _hook(target: HookTarget, see: Callable[[Tensor], Tensor | None]) -> list[Any]:
    """Register `see` on a target; what it returns (unless None) replaces the activation."""
    return _hooked(target, lambda value: None if _OFF.get() else see(value))


def _hooked(target: HookTarget, see: Callable[[Tensor], Tensor | None]) -> list[Any]:
    if target.side == "input":
        return [target.module.register_forward_pre_hook(_before(target, see), with_kwargs=True)]
    inputs: list[Tensor] = []

    def remember(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        # a module that works in place has changed its input by the time that it is done
        inputs.append(_input_of(target.site, args, kwargs)[1].clone())

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        slot, value = _output_of(target.site, output)
        if target.side == "output":
            new = see(value)
        else:
            before = inputs.pop()
            if before.shape != value.shape:
                raise InputError(
                    "there is no update where input and output differ in shape",
                    where=target.site,
                    given=f"{tuple(before.shape)} and {tuple(value.shape)}",
                )
            new = see(value - before)
            # what is left alone keeps its bits, which input + (output - input) would not
            new = None if new is None else value.where(new == value - before, before + new)
        return None if new is None else _with_output(output, slot, new)

    handles: list[Any] = [target.module.register_forward_hook(after)]
    if target.side == "update":
        handles.append(target.module.register_forward_pre_hook(remember, with_kwargs=True))
    return handles


def _before(target: HookTarget, see: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        slot, value = _input_of(target.site, args, kwargs)
        new = see(value)
        if new is None:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, str(slot): new}

    return before


def run_until_captured(
    targets: Sequence[HookTarget],
    run: Callable[[], object],
    shape: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Run a forward pass, keep each target's activation, and stop once all have been seen.

    Of a module that is called several times, the first call's.

    Args: shape is the [batch, position] of the tokens, where the run is over tokens.

    Raises InputError for a site whose module this model's forward pass never calls.
    """
    found: dict[str, Tensor] = {}

    def seeing(target: HookTarget) -> Callable[[Tensor], None]:
        def see(value: Tensor) -> None:
            if target.site in found:
                return
            found[target.site] = target.keep(value, shape)
            if len(found) == len(wanted):
                raise _AllFound

        return see

    wanted = {target.site: target for target in targets}
    handles = [handle for target in wanted.values() for handle in _hook(target, seeing(target))]
    try:
        run()
    except _AllFound:
        pass
    finally:
        for handle in handles:
            handle.remove()
    _check_reached(wanted, found)
    return found


def run_through(
    targets: Sequence[HookTarget], run: Callable[[], object], clock: nn.Module, calls: Sequence[int]
) -> list[dict[str, Tensor]]:
    """Keep each target's activation in some calls, from 0, of a module that `run` calls repeatedly.

    Stops once all have been seen. Raises InputError for a site that a call never reaches.
    """
    found: dict[int, dict[str, Tensor]] = {call: {} for call in calls}
    now = -1

    def count(*_: Any) -> None:
        nonlocal now
        now += 1

    def seeing(target: HookTarget) -> Callable[[Tensor], None]:
        def see(value: Tensor) -> None:
            if target.site in found.get(now, {target.site: value}):
                return
            found[now][target.site] = target.keep(value)
            if all(len(seen) == len(wanted) for seen in found.values()):
                raise _AllFound

        return see

    wanted = {target.site: target for target in targets}
    handles: list[Any] = [clock.register_forward_pre_hook(count)]
    for target in wanted.values():
        handles += _hook(target, seeing(target))
    try:
        run()
    except _AllFound:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for seen in found.values():
        _check_reached(wanted, seen)
    return list(found.values())


def _check_reached(wanted: Mapping[str, object], found: Mapping[str, object]) -> None:
    missing = [site for site in wanted if site not in found]
    if missing:
        raise InputError("this model's forward pass never reaches the site", where=missing[0])


def shapes_of(
    targets: Sequence[HookTarget],
    run: Callable[[], object],
    shape: Sequence[int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Run a whole forward pass; the shape [batch, position, d_in] of each target's activation.

    Args: shape is the [batch, position] of the tokens, where the run is over tokens.

    Raises InputError for a site whose module the pass never calls, or calls more than once: one
    tensor would have to stand for several.
    """
    found: dict[str, list[tuple[int, ...]]] = {}

    def seeing(target: HookTarget) -> Callable[[Tensor], None]:
        def see(value: Tensor) -> None:
            found.setdefault(target.site, []).append(tuple(target.read(value, shape).shape))

        return see

    wanted = {target.site: target for target in targets}
    handles = [handle for target in wanted.values() for handle in _hook(target, seeing(target))]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    _check_reached(wanted, found)
    for site, shapes in found.items():
        if len(shapes) > 1:
            raise InputError(
                f"one forward pass calls this module {len(shapes)} times; choose one that it calls "
                "once",
                where=site,
            )
    return {site: shapes[0] for site, shapes in found.items()}


@contextmanager
def watching(
    watched: Sequence[tuple[HookTarget, Callable[[Tensor | None], None]]],
) -> Iterator[None]:
    """While the context lasts, show the raw tensor of each target to its function, None if there
    is no such tensor."""

    def seeing(target: HookTarget, see: Callable[[Tensor | None], None]) -> list[Any]:
        def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            see(_or_none(lambda: _input_of(target.site, args, kwargs)[1]))

        def after(_module: nn.Module, _args: tuple, output: Any) -> None:
            see(_or_none(lambda: _output_of(target.site, output)[1]))

        if target.side == "input":
            return [target.module.register_forward_pre_hook(before, with_kwargs=True)]
        return [target.module.register_forward_hook(after)]

    handles = [handle for target, see in watched for handle in seeing(target, see)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _or_none(find: Callable[[], Tensor]) -> Tensor | None:
    try:
        return find()
    except InputError:
        return None


@contextmanager
def splicing(
    base: nn.Module,
    edits: Sequence[tuple[HookTarget, PositionedEdit]] | Sequence[tuple[HookTarget, EditFunction]],
    run: Run | GridRun | None = None,
) -> Iterator[None]:
    """Replace activations while the context lasts; see `Model.edit`.

    Args: base is the model. With run, edits get the `TokenPositions` of a pass over texts, or the
    `GridPositions` of one over pictures; without, the activation's own positions [position].
    """

    def seeing(target: HookTarget, function: Any) -> Callable[[Tensor], Tensor | None]:
        def see(value: Tensor) -> Tensor | None:
            x = target.read(value, None if run is None else run.shape)
            if target.in_place and x.requires_grad:
                x = x.clone()  # autograd may need what the function saw, and the value changes
            new = function(x, torch.arange(x.shape[1]) if run is None else run.at(value, x))
            if new is None:
                return None
            if new.shape != x.shape:
                raise InputError(
                    "an edit must return the shape it was given",
                    where=target.site,
                    given=tuple(new.shape),
                    allowed=str(tuple(x.shape)),
                )
            return target.write(value, new.to(x.dtype))

        return see

    handles: list[Any] = []
    if run is not None:
        inner = getattr(base, "base_model", base)  # what is called where no logits are wanted
        handles += run.watch([base, inner] if isinstance(inner, nn.Module) else [base])
    try:
        for target, function in edits:
            handles += _hook(target, seeing(target, function))
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_position(function: EditFunction) -> PositionedEdit:
    """An edit by positions alone: [position], or where rows differ in them [batch, position]."""

    def edit(x: Tensor, where: TokenPositions) -> Tensor | None:
        return function(x, where.position if where.shared is None else where.shared)

    return edit
