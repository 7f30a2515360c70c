"""The vocabulary of "where" in a model: TransformerLens hook names, and patterns over them.

A site names one tensor of shape [batch, position, d_in]:

    blocks.9.hook_resid_post        residual stream after block 9
    blocks.9.hook_resid_pre         residual stream before block 9
    blocks.9.hook_resid_mid         residual stream between attention and MLP (sequential blocks)
    blocks.9.hook_attn_out          what attention adds to the residual stream
    blocks.9.hook_mlp_out           what the MLP adds to the residual stream
    blocks.9.attn.hook_z            attention's heads, concatenated, before the output projection
    blocks.9.attn.hook_q, _k, _v    outputs of the projections, heads concatenated, before rotation
    blocks.9.mlp.hook_post          hidden units of the MLP after the non-linearity (and gate)
    hook_embed                      token embeddings
    blocks.9.attn.hook_in           input or output (hook_in, hook_out) of any mapped component
    module:model.layers.9:output    input or output of any module by its own path

A pattern has `*` for any text within a part, and ranges and lists for layers: `blocks.*.hook_z`,
`blocks.4-12.hook_mlp_out`, `blocks.0,3,6-8.hook_resid_post`; `*` alone is every site.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from saescope.errors import InputError

MODULE_PREFIX = "module:"
_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_LAYER = re.compile(r"blocks\.(\d+)\.")


def is_pattern(site: str) -> bool:
    """Whether a site name stands for several sites.

    >>> is_pattern("blocks.4-12.hook_resid_post"), is_pattern("blocks.4.hook_resid_post")
    (True, False)
    """
    if site.startswith(MODULE_PREFIX):
        return False
    parts = site.split(".")
    return any(c in site for c in "*?[") or any(
        _NUMBERS.fullmatch(part) and not part.isdigit() for part in parts
    )


def layer_of(site: str) -> int | None:
    """The layer a site belongs to, None for one outside the blocks.

    >>> layer_of("blocks.9.hook_resid_post"), layer_of("hook_embed")
    (9, None)
    """
    match = _LAYER.match(site)
    return int(match.group(1)) if match else None


def _part_matches(part: str, pattern: str) -> bool:
    if part.isdigit() and _NUMBERS.fullmatch(pattern):
        bounds = [piece.partition("-") for piece in pattern.split(",")]
        return any(int(low) <= int(part) <= int(high or low) for low, _, high in bounds)
    return fnmatch.fnmatchcase(part, pattern)


def matches(site: str, pattern: str) -> bool:
    """Whether a site is one of those that a pattern stands for.

    >>> matches("blocks.9.attn.hook_z", "blocks.4-12.attn.*")
    True
    >>> matches("blocks.9.attn.hook_z", "blocks.*.hook_*")
    False
    """
    if pattern == "*":
        return True
    parts, patterns = site.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(_part_matches, parts, patterns))


def select(patterns: Sequence[str], available: Iterable[str], *, where: str) -> list[str]:
    """The available sites that match any of the patterns, in the model's order.

    Raises InputError for a pattern that matches nothing.
    """
    known = list(available)
    chosen = set()
    for pattern in patterns:
        found = {site for site in known if matches(site, pattern)}
        if not found:
            raise InputError(
                "no site of this model matches", where=where, given=pattern,
                allowed=_closest(pattern, known),
            )  # fmt: skip
        chosen |= found
    return [site for site in known if site in chosen]


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
