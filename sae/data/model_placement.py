"""An SAE at its sites of a model that has the SAE's width and the weights it was trained on."""

import torch

from activations import Model
from sae.core.base import SparseAutoencoder
from sae.data.model_expectations import warn_of_model
from sae.data.placement import Placement, placement_of
from sae.data.provenance import check_trained_on
from saescope.errors import InputError


def placement_in(
    model: Model,
    sae: SparseAutoencoder,
    site: str | None,
    *,
    where: str | None = None,
    allow_other_model: bool = False,
) -> Placement:
    """The SAE at its sites of a model.

    Raises InputError if no site is known, if a site's width is not the SAE's, and, unless it is
    allowed, if the SAE was trained on another model.

    Args: where names what cannot be done with a crosscoder, and refuses one.
    """
    if where is not None and sae.concatenates:
        raise InputError(
            "a crosscoder's features are known only after the last of its sites, so none of them "
            "can be changed",
            where=where,
            allowed="SAEs of one site, transcoders",
        )
    placement = placement_of(sae, site)
    if hasattr(model, "bos_token_id"):  # of models of pictures no other library's SAEs are read
        warn_of_model(
            sae,
            where=model.name,
            has_bos=model.bos_token_id is not None,
            layer_norm=any(isinstance(each, torch.nn.LayerNorm) for each in model.hf.modules()),
        )
    read, written = tuple(model.resolve(placement.read)), tuple(model.resolve(placement.written))
    for names, width in ((read, sae.d_in), (written, sae.d_out)):
        found = sum(model.d_in(name) for name in names)
        if found != width:
            raise InputError(
                "width differs from the SAE's",
                where=", ".join(names),
                given=found,
                allowed=str(width),
            )
    check_trained_on(model, sae, where=where or "SAE", allow_other_model=allow_other_model)
    return placement._replace(read=read, written=written)
