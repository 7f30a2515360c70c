"""The vocabulary of "where" in a model: TransformerLens hook names, modules, and patterns.

A site names one tensor of shape [batch, position, d_in]; most have a short name as well:

    blocks.9.hook_resid_pre         resid_pre:9    residual stream before block 9
    blocks.9.hook_resid_mid         resid_mid:9    between attention and MLP (sequential blocks)
    blocks.9.hook_resid_post        resid_post:9   residual stream after block 9
    blocks.9.ln1.hook_out, ln2      ln1:9, ln2:9   outputs of the norms before attention and MLP
    blocks.9.ln2.hook_normalized                   an RMSNorm's output without its gain
    blocks.9.attn.hook_q, _k, _v    q:9, k:9, v:9  outputs of the projections, heads concatenated,
                                                   before rotation
    blocks.9.attn.hook_z            z:9            attention's heads, concatenated, before the
                                                   output projection
    blocks.9.hook_attn_out          attn_out:9     what attention adds to the residual stream
    blocks.9.mlp.hook_in            mlp_in:9       what the MLP reads
    blocks.9.mlp.hook_pre           mlp_pre:9      its hidden units before the non-linearity (of a
                                                   gated MLP: the gate's)
    blocks.9.mlp.hook_post          mlp_post:9     after the non-linearity (and gate)
    blocks.9.hook_mlp_out           mlp_out:9      what the MLP adds to the residual stream
    hook_embed, hook_pos_embed      embed, pos_embed
    ln_final.hook_out               ln_final       output of the last norm
    blocks.9.attn.hook_in                          input or output (hook_in, hook_out) of any
                                                   component that TransformerLens knows
    module:model.layers.9:output                   a module by its own path in the PyTorch model;
                                                   input, output, or update = output - input

A module's tensor [batch, width] has one position; in [batch, channel, height, width] the positions
are the positions of the feature map, row by row.

A pattern has `*` for any text within a part, and ranges and lists for layers: `resid_post:*`,
`z:4-12`, `blocks.0,3,6-8.hook_resid_post`, `module:encoder.layer.*:output`; `*` alone is every
named site.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from saescope.errors import InputError

MODULE_PREFIX = "module:"
SIDES = ("input", "output", "update")
_IN_BLOCKS = {
    **{name: f"hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post")},
    **{name: f"hook_{name}" for name in ("attn_out", "mlp_out")},
    **{name: f"attn.hook_{name}" for name in "qkvz"},
    **{f"mlp_{name}": f"mlp.hook_{name}" for name in ("in", "pre", "post")},
    **{name: f"{name}.hook_out" for name in ("ln1", "ln2")},
}
"""Short names of sites that every block has."""
_ALONE = {"embed": "hook_embed", "pos_embed": "hook_pos_embed", "ln_final": "ln_final.hook_out"}
_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_LAYER = re.compile(r"blocks\.(\d+)\.")


def full_name(site: str) -> str:
    """The full name, or pattern, that a short one stands for; any other as it is.

    Raises InputError for a short name that does not exist or has no layers.

    >>> full_name("z:4-12"), full_name("embed"), full_name("blocks.9.hook_resid_post")
    ('blocks.4-12.attn.hook_z', 'hook_embed', 'blocks.9.hook_resid_post')
    """
    name, colon, layers = site.partition(":")
    if site.startswith(MODULE_PREFIX):
        return site
    if name in _IN_BLOCKS and (layers == "*" or _NUMBERS.fullmatch(layers)):
        return f"blocks.{layers}.{_IN_BLOCKS[name]}"
    if colon or name in _IN_BLOCKS:
        raise InputError(
            "no such short name of a site",
            where="sites",
            given=site,
            allowed=f"{', '.join(_IN_BLOCKS)} with layers, such as z:* or z:0,4-12; "
            f"{', '.join(_ALONE)} without; {MODULE_PREFIX}PATH:{'|'.join(SIDES)}",
        )
    return _ALONE.get(site, site)


def module_and_side(site: str) -> tuple[str, str]:
    """Path and side of a module site.

    >>> module_and_side("module:encoder.layer.3:update")
    ('encoder.layer.3', 'update')
    """
    path, _, side = site.removeprefix(MODULE_PREFIX).rpartition(":")
    return path, side


def _parts(site: str) -> list[str]:
    if not site.startswith(MODULE_PREFIX):
        return site.split(".")
    path, side = module_and_side(site)
    return [MODULE_PREFIX + side, *path.split(".")]


def is_pattern(site: str) -> bool:
    """Whether a full name stands for several sites.

    >>> is_pattern("blocks.4-12.hook_resid_post"), is_pattern("blocks.4.hook_resid_post")
    (True, False)
    """
    return any(c in site for c in "*?[") or any(
        _NUMBERS.fullmatch(part) and not part.isdigit() for part in _parts(site)
    )


def layer_of(site: str) -> int | None:
    """The layer a site belongs to, None for one outside the blocks.

    >>> layer_of("blocks.9.hook_resid_post"), layer_of("hook_embed")
    (9, None)
    """
    match = _LAYER.match(site)
    return int(match.group(1)) if match else None


def layers_of(numbers: str) -> list[int]:
    """The layers that text names, each once, in order.

    Raises ValueError for text that names none.

    >>> layers_of("0,6-8")
    [0, 6, 7, 8]
    """
    if not _NUMBERS.fullmatch(numbers):
        raise ValueError(numbers)
    return sorted({n for low, high in _bounds(numbers) for n in range(low, high + 1)})


def _bounds(numbers: str) -> list[tuple[int, int]]:
    """First and last of each piece of a list of numbers and ranges."""
    pieces = [piece.partition("-") for piece in numbers.split(",")]
    return [(int(low), int(high or low)) for low, _, high in pieces]


def _part_matches(part: str, pattern: str) -> bool:
    if part.isdigit() and _NUMBERS.fullmatch(pattern):
        return any(low <= int(part) <= high for low, high in _bounds(pattern))
    return fnmatch.fnmatchcase(part, pattern)


def matches(site: str, pattern: str) -> bool:
    """Whether a site is one of those that a full name or pattern stands for.

    >>> matches("blocks.9.attn.hook_z", "blocks.4-12.attn.*")
    True
    >>> matches("blocks.9.attn.hook_z", "blocks.*.hook_*")
    False
    """
    if pattern == "*":
        return not site.startswith(MODULE_PREFIX)
    parts, patterns = _parts(site), _parts(pattern)
    return len(parts) == len(patterns) and all(map(_part_matches, parts, patterns))


def select(patterns: Sequence[str], available: Iterable[str], *, where: str) -> list[str]:
    """The available sites that match any of the patterns, in the model's order.

    Raises InputError for a pattern that matches nothing, or names a layer after the last.
    """
    known = list(available)
    chosen = set()
    for pattern in patterns:
        found = {site for site in known if matches(site, pattern)}
        beyond = _layer_beyond(pattern, known)
        if not found or beyond:
            raise InputError(
                f"no site of this model matches{beyond}",
                where=where,
                given=pattern,
                allowed=_closest(pattern, known),
            )
        chosen |= found
    return [site for site in known if site in chosen]


def _layer_beyond(pattern: str, known: Sequence[str]) -> str:
    """What to say if a pattern names a layer that the model does not have, else nothing."""
    last = max((layer for site in known if (layer := layer_of(site)) is not None), default=None)
    parts = pattern.split(".")
    if last is None or parts[0] != "blocks" or not _NUMBERS.fullmatch(parts[1]):
        return ""
    wanted = max(high for _, high in _bounds(parts[1]))
    return f" layer {wanted}: its last layer is {last}" if wanted > last else ""


def _closest(site: str, available: Sequence[str]) -> str:
    """A few of the available names that look most like the one given, for an error message."""
    near = difflib.get_close_matches(site, available, n=4, cutoff=0.5)
    return f"{', '.join(near or available[:8])}, ..." if available else "none"


def unknown_site(site: str, available: Sequence[str], *, where: str) -> InputError:
    """The error for a site that the model does not have; it names the nearest that it has."""
    layers = sorted({layer for name in available if (layer := layer_of(name)) is not None})
    what = "no such site in this model"
    wanted = layer_of(site)
    if wanted is not None and layers and wanted > layers[-1]:
        what += f", whose last layer is {layers[-1]}"
    return InputError(what, where=where, given=site, allowed=_closest(site, available))
