"""What SAEs make of one prompt: active features, what each writes where, and what is left over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from activations import Model
from activations.sites.names import layer_of
from sae.architectures._lista import refuse_lista
from sae.architectures.cross_layer_transcoder import CrossLayerTranscoder
from sae.architectures.gated import GatedSAE
from sae.architectures.matching_pursuit import MatchingPursuitSAE
from sae.architectures.skip_transcoder import SkipTranscoder
from sae.core.base import SparseAutoencoder
from sae.core.config import kind_of
from sae.data.placement import Placement
from sae.data.provenance import weights_hash
from sae.kernels.codes import SparseCodes
from sae.steering.steer import placement_in
from saescope.errors import InputError

_SAME = 1e-3
"""by how much, relative, activations may differ from pre-activations in rounding"""


@dataclass(frozen=True)
class Part:
    """The active features of one SAE on a prompt, in the model's units, in float32.

    They are ordered by position, then number.
    """

    name: str
    """what the SAE is called"""
    read: str
    written: str
    position: Tensor
    """[features] int64"""
    number: Tensor
    """[features] int64"""
    activation: Tensor
    """[features]"""
    encoder: Tensor
    """[features, d_in]: each one's pre-activation is x[position] . encoder + bias"""
    bias: Tensor
    """[features]"""
    decoder: Tensor
    """[features, d_out]: what each one writes, its activation times its decoder's row"""
    constant: Tensor
    """[pos, d_out]: the rest of the reconstruction, from biases; 0 where nothing is read"""
    skip: Tensor | None
    """[d_in, d_out]: a linear path beside the features"""
    error: Tensor
    """[pos, d_out]: what was there less the reconstruction; all of it where nothing is read"""
    sae_hash: str = ""
    """of the SAE's weights, as its feature store has it; "" where there is no SAE"""
    later: dict[str, Tensor] = field(default_factory=dict)
    """[features, d_out] by site: what each one writes at others too (cross-layer transcoders)"""


def placements_of(
    model: Model, saes: Sequence[SparseAutoencoder], *, allow_other_model: bool = False
) -> list[Placement]:
    """The SAEs at their sites.

    Raises InputError for none, for one that cannot be cut into features, and for two that write at
    one site.
    """
    if not saes:
        raise InputError("wants at least one SAE or transcoder", where="saes")
    found = [
        placement_in(
            model,
            each,
            None,
            where=None if isinstance(each, CrossLayerTranscoder) else "circuit",
            allow_other_model=allow_other_model,
        )
        for each in saes
    ]
    for each in found:
        _check(each.sae)
    written = [site for each in found for site in each.written]
    for site in written:
        if written.count(site) > 1:
            raise InputError("two SAEs write at one site", where="saes", given=site)
    return found


def _check(sae: SparseAutoencoder) -> None:
    if isinstance(sae, MatchingPursuitSAE):
        raise InputError(
            "chooses features one after another, so none has a pre-activation of its own",
            where="circuit",
            given=kind_of(sae.config),
        )
    refuse_lista(sae, "circuit")
    if sae.normaliser.kind == "standardised":
        raise InputError(
            "each row is divided by its own deviation, which no graph holds",
            where="circuit",
            given="normaliser standardised",
        )


@torch.no_grad()
def part_of(placed: Placement, x: Tensor, h: Tensor, kept: Tensor, *, unread_errors: bool) -> Part:
    """An SAE's features of x [pos, d_in] beside what is written, h [pos, d_out].

    Args: kept [pos] says at which positions SAEs read; what is written at the others is all error,
    or, without unread_errors, all constant.

    Raises InputError for an architecture whose activations are not its pre-activations.
    """
    sae = placed.sae
    rows = kept.nonzero()[:, 0]
    own = sae.W_dec
    seen = x[kept].to(own.device, own.dtype)
    codes = sae.encode_sparse(seen)
    counts = codes.row_ptr.diff()
    at = torch.repeat_interleave(torch.arange(len(rows), device=counts.device), counts)
    # features of a row in the order of their numbers; those that are stored but 0 are not active
    order = torch.argsort(at * sae.d_sae + codes.index.long(), stable=True)
    order = order[codes.value[order] != 0]
    at, number, activation = at[order], codes.index.long()[order], codes.value[order].float()
    encoder, bias = _encoder(sae, number)
    found = (seen.float()[at] * encoder).sum(1) + bias
    scale = (seen.float().norm(dim=1)[at] * encoder.norm(dim=1) + bias.abs()).clamp_min(1e-12)
    if bool(((found - activation).abs() > _SAME * scale).any()):
        raise InputError(
            "its activations are not its pre-activations, so they are no sum of what they get",
            where="circuit",
            given=kind_of(sae.config),
        )
    decoder = own.float()[number] * activation[:, None]
    skip = sae.W_skip.float() if isinstance(sae, SkipTranscoder) else None
    reconstruction = sae.decode(codes, like=seen).float()
    constant = torch.zeros(len(x), own.shape[1], device=own.device)
    constant[rows] = reconstruction.index_add(0, at, decoder, alpha=-1)
    if skip is not None:
        constant[rows] -= seen.float() @ skip
    error = h.float().clone()
    error[rows] -= reconstruction
    if not unread_errors:
        constant[~kept], error[~kept] = error[~kept], 0.0
    return Part(
        str(sae.metadata.get("name") or placed.read[0]),
        placed.read[0],
        placed.written[0],
        rows[at],
        number,
        activation,
        encoder,
        bias,
        decoder,
        constant,
        skip,
        error,
        weights_hash(sae),
    )


@torch.no_grad()
def parts_across(
    placed: Placement,
    x: Mapping[str, Tensor],
    kept: Tensor,
    *,
    unread_errors: bool,
) -> list[Part]:
    """A part a layer of a cross-layer transcoder, of activations [pos, d] by site."""
    sae = placed.sae
    assert isinstance(sae, CrossLayerTranscoder)
    rows = kept.nonzero()[:, 0]
    seen = torch.cat([x[site][kept] for site in placed.read], 1).to(sae.b_dec)
    active = sae.encode(seen).float()
    reconstruction = sae.decode(SparseCodes.from_dense(active.to(seen))).float()
    width = reconstruction.shape[1] // sae.layers
    parts = []
    for layer, (read, written) in enumerate(zip(placed.read, placed.written, strict=True)):
        own = sae.features_of(layer)
        at, number = active[:, own].nonzero(as_tuple=True)
        activation = active[:, own][at, number]
        writes = sae.decoder(layer).detach().float()[number] * activation[:, None, None]
        h, columns = x[written].float(), slice(layer * width, (layer + 1) * width)
        constant, error = torch.zeros_like(h), h.clone()
        constant[rows] = sae.b_dec.detach().float()[columns]
        error[rows] -= reconstruction[:, columns]
        if not unread_errors:
            constant[~kept], error[~kept] = error[~kept], 0.0
        name = str(sae.metadata.get("name") or read)
        encoder = sae.W_enc_T.detach()[own][number].float()
        bias = sae.b_enc.detach()[own][number].float()
        later = {site: writes[:, n] for n, site in enumerate(placed.written[layer:]) if n > 0}
        parts.append(
            Part(
                name,
                read,
                written,
                rows[at],
                number,
                activation,
                encoder,
                bias,
                writes[:, 0],
                constant,
                None,
                error,
                weights_hash(sae),
                later,
            )
        )
    return parts


def bare_part(site: str, h: Tensor, kept: Tensor, *, unread_errors: bool) -> Part:
    """A site that is cut and has no SAE: what is written there, h [pos, d_out], is all error."""
    error = h.float().clone()
    if not unread_errors:
        error[~kept] = 0.0
    none = torch.zeros(0, dtype=torch.int64, device=h.device)
    vectors = error[:0]
    return Part(
        "none",
        site,
        site,
        none,
        none,
        none.float(),
        vectors,
        none.float(),
        vectors,
        h.float() - error,
        None,
        error,
    )


def uncut_mlps(model: Model, placed: Sequence[Placement]) -> list[str]:
    """What the MLPs write that no transcoder stands for, and that a linear run has to cut."""
    cut = {
        layer_of(site) for each in placed for site in each.written if "mlp" in site or "ln2" in site
    }
    return [f"blocks.{layer}.hook_mlp_out" for layer in range(model.n_layers) if layer not in cut]


def _encoder(sae: SparseAutoencoder, number: Tensor) -> tuple[Tensor, Tensor]:
    """Directions [features, d_in] and biases [features] of pre-activations, float32."""
    direction = sae.W_enc_T.detach()[number].float()
    if isinstance(sae, GatedSAE):
        direction = direction * sae.r_mag.detach()[number].float().exp()[:, None]
    bias = (sae.b_mag if isinstance(sae, GatedSAE) else sae.b_enc).detach()[number].float()
    if sae.pre_bias:
        bias = bias - direction @ sae.b_dec.detach().float()
    return direction, bias
