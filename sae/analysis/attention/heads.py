"""Head attribution by weights: which attention heads a feature is made of, without running a model.

An SAE at attn.hook_z sees the heads side by side, so a decoder row is one piece a head, and

    share of head h = ||W_dec[f, h]|| / sum_h' ||W_dec[f, h']||

(Kissane et al. 2024, arXiv 2406.17759, section 3). At hook_attn_out the heads have been added up:
attn_out = sum_h z_h W_O[h], and two things can be said of a direction d there.

    by "encoder"   W_O[h] W_enc[:, f], what the feature reads of each head's output. Always defined.
    by "decoder"   the smallest z with z W_O as near to W_dec[f] as can be. Where W_O has an inverse
                   z is the only one that writes it. Where heads are wider than the stream together
                   (`unique` is false) others do so too. What no z writes is `outside`.

Singular values of W_O below a thousandth of the largest count as 0 there: pulled back through them
a direction's norms would say more of rounding than of heads. A norm behind W_O has a scale at each
position, which no share depends on; its gain is counted.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from activations import Model
from activations.models.attention import HeadOutputs
from sae.analysis.attention.sums import sum_at
from sae.core.base import SparseAutoencoder
from sae.data.model_placement import placement_in
from saescope.errors import InputError, check_choice

Side = Literal["decoder", "encoder"]
_SMALLEST = 1e-3
"""of the largest singular value of W_O: those below count as 0"""
_RANDOM = 2048
"""random directions that shares are compared with"""


@dataclass(frozen=True, kw_only=True)
class HeadAttribution:
    """How much of each feature belongs to each head of its layer."""

    layer: int
    side: Side
    norm: Float[Tensor, "d_sae heads"]
    """float64; the scale is that of the SAE's weights, so compare shares between features"""
    outside: Float[Tensor, " d_sae"]
    """of a decoder row's squared length, the part that no head can write; 0 at attn.hook_z"""
    unique: bool
    """whether no other outputs of heads write the same"""
    random: Float[Tensor, "directions heads"]
    """the norms of random directions of the site, which belong to no head more than to another"""

    @property
    def share(self) -> Float[Tensor, "d_sae heads"]:
        """Each head's part of the sum over heads; 0 for a feature that writes nothing."""
        return _shares(self.norm)

    @property
    def top_head(self) -> Tensor:
        """int64 [d_sae], the head with the largest share."""
        return self.norm.argmax(1)

    @property
    def random_top_share(self) -> float:
        """Which largest share 95 of 100 random directions stay below."""
        return float(_shares(self.random).amax(1).quantile(0.95))

    def features_of(self, head: int, count: int) -> list[int]:
        """The features with the largest share in a head, the largest first."""
        order = self.share[:, head].argsort(descending=True, stable=True)
        return order[:count].tolist()


def _shares(norm: Tensor) -> Tensor:
    return norm / norm.sum(1, keepdim=True).clamp_min(torch.finfo(norm.dtype).tiny)


def head_norms(directions: Tensor, heads: int) -> Tensor:
    """Norms [n, heads], float64, of directions [n, heads * d_head] within each head.

    Raises InputError for a width that is not so many heads'.

    >>> head_norms(torch.tensor([[3.0, 4.0, 0.0, 2.0]]), 2).tolist()
    [[5.0, 2.0]]
    """
    if heads < 1 or directions.shape[1] % heads:
        raise InputError(
            "is not as wide as so many heads side by side",
            where="directions",
            given=f"width {directions.shape[1]}, {heads} heads",
        )
    return rearrange(directions.double(), "f (head d) -> f head d", head=heads).norm(dim=-1)


def heads_of(model: Model) -> int:
    """How many attention heads a layer of a model has. InputError if its configuration says not."""
    heads = getattr(model.hf.config.get_text_config(), "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        raise InputError("the model does not say how many heads it has", where=model.spec)
    return heads


def attention_site(site: str) -> tuple[int, bool]:
    """The layer of a site of attention's outputs, and whether heads are side by side there.

    Raises InputError for another site.

    >>> attention_site("blocks.9.attn.hook_z"), attention_site("blocks.3.hook_attn_out")
    ((9, True), (3, False))
    """
    layer, name = sum_at(site) or (0, "")
    if name not in ("attn.hook_z", "hook_attn_out"):
        raise InputError(
            "features belong to attention heads only where attention's outputs are",
            where="site",
            given=site,
            allowed="blocks.N.attn.hook_z, blocks.N.hook_attn_out",
        )
    return layer, name == "attn.hook_z"


@torch.no_grad()
def head_attribution(
    model: Model,
    sae: SparseAutoencoder,
    *,
    by: Side = "decoder",
    site: str | None = None,
    allow_other_model: bool = False,
    seed: int = 0,
) -> HeadAttribution:
    """Each feature's norm in each head, of an SAE at attn.hook_z or hook_attn_out.

    Args:
        by: what the feature writes ("decoder") or reads ("encoder").
        site: where, if not the site the SAE was trained at.
        allow_other_model: use an SAE of another model; it is said.
        seed: of the random directions.

    Raises InputError for another site, a transcoder or a crosscoder, and a layer whose heads do not
    end in one plain matrix.

    >>> found = head_attribution(model, sae)                                   # doctest: +SKIP
    >>> found.features_of(head=3, count=10), found.random_top_share            # doctest: +SKIP
    """
    check_choice("no such weights", "by", by, get_args(Side))
    if sae.transcodes or sae.concatenates:
        raise InputError("reads and writes different sites", where="head_attribution")
    placement = placement_in(model, sae, site, allow_other_model=allow_other_model)
    layer, side_by_side = attention_site(placement.read[0])
    heads = heads_of(model)
    own = placement.sae
    directions = (own.W_dec if by == "decoder" else own.W_enc_T).detach().double().cpu()
    # not torch's generator, of whose numbers an SAE's own first weights may be made
    draw = np.random.default_rng(seed)
    random = torch.from_numpy(draw.standard_normal((_RANDOM, directions.shape[1])))
    outside, unique = torch.zeros(len(directions), dtype=torch.float64), True
    if not side_by_side:
        out = HeadOutputs.of(model, layer).up_to_scale()
        if by == "encoder":
            directions, random = directions @ out.T, random @ out.T
        else:
            back = torch.linalg.pinv(out, rtol=_SMALLEST)
            written = directions @ back
            length = directions.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
            outside = (directions - written @ out).square().sum(1) / length
            unique = bool(torch.linalg.matrix_rank(out, rtol=_SMALLEST) == len(out))
            directions, random = written, random @ back
    return HeadAttribution(
        layer=layer,
        side=by,
        norm=head_norms(directions, heads),
        outside=outside,
        unique=unique,
        random=head_norms(random, heads),
    )
