"""Sites whose activation is a sum over attention heads; needs no torch, so that pages can ask."""

import re

SITES = ("attn.hook_z", "hook_attn_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
"""names of a block's sites (see `activations.sites.names`)"""
_SITE = re.compile(rf"blocks\.(\d+)\.({'|'.join(map(re.escape, SITES))})")


def sum_at(site: str) -> tuple[int, str] | None:
    """The layer and the name of such a site; None for any other.

    >>> sum_at("blocks.9.attn.hook_z"), sum_at("blocks.9.hook_mlp_out")
    ((9, 'attn.hook_z'), None)
    """
    match = _SITE.fullmatch(site)
    return (int(match[1]), match[2]) if match else None
