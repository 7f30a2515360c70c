"""Where an SAE reads and writes: at one site, from one to another, or at several at once."""

from collections.abc import Callable
from typing import NamedTuple

from sae.core.base import SparseAutoencoder
from saescope.errors import InputError


class Placement(NamedTuple):
    """An SAE ready to be used at its sites."""

    sae: SparseAutoencoder
    """of one layer, its weights in the model's units (but for a per-vector normaliser)"""
    read: tuple[str, ...]
    """the sites whose activations, side by side, are encoded"""
    written: tuple[str, ...]
    """the sites whose activations, side by side, are reconstructed"""

    def columns(self, width: Callable[[str], int]) -> dict[str, slice]:
        """Where each written site stands in a reconstruction, given the sites' widths."""
        found, start = {}, 0
        for site in self.written:
            found[site] = slice(start, start + width(site))
            start = found[site].stop
        return found


def placement_of(
    sae: SparseAutoencoder, site: str | None = None, *, behind_lens: bool = False
) -> Placement:
    """An SAE at its sites: those that it records, or the layer chosen of a several-layer SAE.

    Args:
        site: the layer of an SAE of several, or another site than the one recorded. Transcoders and
            crosscoders have their own; only of another library's transcoder can the site that it
            reads be given, since its files may name one that the model does not have.
        behind_lens: allow an SAE trained behind a tuned lens, whose features are not of the model's
            own activations.

    Raises InputError if no site is known, or for one that the SAE is not for.
    """
    if sae.metadata.get("lens") and not behind_lens:
        raise InputError(
            "this SAE was trained behind a tuned lens: its features are not of the model's own "
            "activations, and it can only be evaluated",
            where="lens",
            given=sae.metadata["lens"],
        )
    from activations.sites.names import full_name

    site = None if site is None else full_name(site)
    if sae.site_normalisers:
        if site is None:
            raise InputError(
                "this SAE is of several layers: choose one",
                where="site",
                given=None,
                allowed=sae.site_normalisers,
            )
        return Placement(sae.at(site), (site,), (site,))
    recorded = sae.metadata.get("site")
    if not (sae.transcodes or sae.concatenates):
        name = site or recorded
        if name is None:
            raise InputError("this SAE does not say where it belongs; give site", where="site")
        return Placement(released(sae), (name,), (name,))
    several = sae.metadata.get("sites") if sae.concatenates else None
    read = tuple(several or [name for name in (recorded or site,) if name])
    target = sae.metadata.get("target_site")
    targets = tuple(sae.metadata.get("target_sites") or [name for name in (target,) if name])
    if not read or (sae.transcodes and not targets):
        raise InputError(
            "this SAE does not say which sites it reads and writes; give site and target_site",
            where="site",
            given={"site": recorded, "target_site": target},
        )
    if site is not None and read != (site,):
        if not sae.metadata.get("format"):
            raise InputError(
                "this SAE reads sites of its own",
                where="site",
                given=site,
                allowed=", ".join(read),
            )
        read = (site,)
    return Placement(released(sae), read, targets if sae.transcodes else read)


def released(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The SAE, folded if it is not, so that its weights are in the model's units."""
    kinds = {sae.normaliser.kind, sae.normaliser_out.kind}
    return sae if kinds <= {"none", "standardised"} else sae.fold()
