"""Which named sites a model really has: read in one small forward pass, and checked by their sums.

A table of architectures says which module is which, and can be wrong for a variant of one. So every
site is read once, on a few tokens: those are listed that are one activation a token. And what
attention and MLP are said to add to the residual stream has to be what they add:

    sequential        resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post
    parallel          resid_pre + attn_out + mlp_out = resid_post
    norms after sums  norm(resid_pre + attn_out) = resid_mid, norm(resid_mid + mlp_out) = resid_post

Where there are several candidates for a site, the one whose sum is right is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from activations.sites.hooks import HookTarget, watching
from saescope.errors import InputError

SEQUENTIAL, PARALLEL, AFTER = "sequential", "parallel", "norms after sums"
_SHAPE = (3, 2)
_TOLERANCE = 1e-2

Candidates = Mapping[str, Sequence[HookTarget]]
"""Of each site the targets that it may be, the likeliest first."""


@dataclass
class Readable:
    """The sites that can be read."""

    targets: dict[str, HookTarget] = field(default_factory=dict)
    """the target of each, in the model's order"""
    refused: dict[str, str] = field(default_factory=dict)
    """why there is nothing at the others"""
    sums: dict[int, str] = field(default_factory=dict)
    """how the parts of a layer add up; "" where that is not known"""


@dataclass
class _Seen:
    target: HookTarget
    x: Tensor | None = None
    """[batch, position, width], float64"""
    why: str = ""
    """why there is none"""
    calls: int = 0


def readable(
    candidates: Candidates,
    norms: Sequence[tuple[nn.Module | None, nn.Module | None]],
    run: Callable[[Tensor], object],
    d_vocab: int,
) -> Readable:
    """Run a model on a few tokens and find out which sites can be read, and where.

    Args: norms are each block's, after attention and after the MLP, if they follow the sums.
    """
    seen = {site: [_Seen(target) for target in found] for site, found in candidates.items()}
    everything = [each for group in seen.values() for each in group]
    count = _SHAPE[0] * _SHAPE[1]
    tokens = ((d_vocab // 2 + torch.arange(count)) % d_vocab).view(_SHAPE)
    with torch.no_grad(), watching([(each.target, _seeing(each)) for each in everything]):
        run(tokens)
    for each in everything:
        if each.calls != 1:
            called = f"one forward pass calls its module {each.calls} times"
            each.x, each.why = None, called if each.calls else "the forward pass never reaches it"
    result = Readable()
    chosen: dict[str, _Seen] = {}
    for layer, pair in enumerate(norms):
        result.sums[layer] = _choose(seen, f"blocks.{layer}.hook_", pair, chosen)
    for site, group in seen.items():
        taken = chosen.get(site) or next((each for each in group if each.x is not None), group[0])
        if taken.x is None or taken.why:
            result.refused[site] = taken.why
        else:
            result.targets[site] = taken.target
    return result


def _seeing(each: _Seen) -> Callable[[Tensor | None], None]:
    def see(value: Tensor | None) -> None:
        each.calls += 1
        try:
            x = None if value is None else each.target.keep(value, _SHAPE)
        except InputError:
            x = None
        if x is None or tuple(x.shape[:2]) != _SHAPE:
            each.why = "is not one activation a token"
        else:
            each.x = x.detach().double()

    return see


def _choose(
    seen: Mapping[str, list[_Seen]],
    block: str,
    norms: tuple[nn.Module | None, nn.Module | None],
    chosen: dict[str, _Seen],
) -> str:
    """Take the candidates of a block that add up; say how they do, and of what does not why."""

    def group(name: str) -> list[_Seen]:
        return [each for each in seen.get(block + name, []) if each.x is not None]

    pre, post = group("resid_pre"), group("resid_post")
    attn, mid, mlp = group("attn_out"), group("resid_mid"), group("mlp_out")
    if not pre or not post:
        for name in ("attn_out", "resid_mid", "mlp_out"):
            _refuse(seen, block + name, chosen, "the stream before or after the block is unknown")
        return ""
    start, end = _x(pre[0]), _x(post[0])
    halves = [(a, m, _adds(start, _x(a), _x(m), norms[0])) for m, a in product(mid, attn)]
    rest = [(b, m, _adds(_x(m), _x(b), end, norms[1])) for m, b in product(mid, mlp)]
    for a, m, first in halves:
        second = next(((b, how) for b, n, how in rest if n is m and how), None)
        if first and second:
            names = zip(("attn_out", "resid_mid", "mlp_out"), (a, m, second[0]), strict=True)
            chosen.update({block + name: each for name, each in names})
            return SEQUENTIAL if {first, second[1]} == {SEQUENTIAL} else AFTER
    for a, b in product(attn, mlp):
        if _adds(start, _x(a) + _x(b), end, None):
            chosen.update({block + "attn_out": a, block + "mlp_out": b})
            _refuse(seen, block + "resid_mid", chosen, "attention and MLP are parallel")
            return PARALLEL
    return _by_halves(seen, block, [h for h in halves if h[2]], [r for r in rest if r[2]], chosen)


def _by_halves(
    seen: Mapping[str, list[_Seen]],
    block: str,
    halves: Sequence[tuple[_Seen, _Seen, str]],
    rest: Sequence[tuple[_Seen, _Seen, str]],
    chosen: dict[str, _Seen],
) -> str:
    """Of a block that does not add up as a whole: the half that does."""
    parts = {"attn_out": halves[:1], "mlp_out": [] if halves else rest[:1]}
    for name, found in parts.items():
        for part, mid, _ in found:
            chosen.update({block + name: part, block + "resid_mid": mid})
        if not found:
            _refuse(seen, block + name, chosen, "what is read there is not what the stream gains")
    if not halves and not rest:
        _refuse(seen, block + "resid_mid", chosen, "nothing adds up to it")
    return next((how for *_, how in [*halves[:1], *rest[:1]]), "")


def _refuse(seen: Mapping[str, list[_Seen]], site: str, chosen: dict[str, _Seen], why: str) -> None:
    for each in seen.get(site, [])[:1]:
        chosen[site] = _Seen(each.target, None, each.why or why)


def _x(each: _Seen) -> Tensor:
    assert each.x is not None
    return each.x


def _adds(start: Tensor, added: Tensor, end: Tensor, norm: nn.Module | None) -> str:
    """How start and what is added become end; "" if they do not.

    Of a stream in 16 bits the difference is only known to its rounding.
    """
    if not start.shape == added.shape == end.shape:
        return ""
    rounding = 2**-8 if bool((end.bfloat16().double() == end).all()) else 2**-10
    rounding = rounding if bool((end.half().double() == end).all()) or rounding == 2**-8 else 1e-6
    slack = rounding * float(start.norm() + end.norm())
    off = float((end - start - added).norm())
    if off <= _TOLERANCE * float(added.norm()) + slack:
        return SEQUENTIAL
    if norm is None:
        return ""
    weight = next(norm.parameters(), None)
    total = start + added
    if weight is not None and weight.device.type != "meta":  # else brought when it is called
        total = total.to(weight.device)
    with torch.no_grad():
        after = norm(total.to(torch.float32 if weight is None else weight.dtype))
    known = isinstance(after, Tensor) and after.shape == end.shape
    if known and float((after.double().cpu() - end.cpu()).norm()) <= _TOLERANCE * float(end.norm()):
        return AFTER
    return ""
