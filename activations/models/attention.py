"""Attention taken apart: how strongly each head reads each position, and the map behind the heads.

A head's output at a position is a sum over sources, z = sum_s pattern[s] v[s] (Vaswani et al. 2017,
section 3.2.1), and attention adds attn_out = z W_O + b_O to the residual stream, in some models
through one more norm and times a constant. With the pattern, and that norm's scale, as they were in
the run, all of it is linear in the values.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from activations.models.language import Model
from activations.models.matmul_precision import multiplied_in
from activations.sites.hooks import HookTarget, watching
from activations.sites.normalised import normalised_target
from saescope.errors import InputError

LONGEST = 1024
"""tokens of a run: each layer's patterns have their number squared for each head"""
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""by how much, relative, sums may differ from what a model of a precision made of them"""
_MOST = 0.1
"""relative difference of two runs, whatever the precision; ten times the above otherwise"""


@dataclass(frozen=True)
class AttentionRun:
    """What a run over one text had at some sites, with how its heads attended."""

    at: dict[str, Float[Tensor, "pos d"]]
    """by site, float64"""
    pattern: list[Float[Tensor, "head destination source"]]
    """by layer, float64: the weights by which each head sums values"""


def run_with_patterns(
    model: Model, tokens: Sequence[int], sites: Sequence[str], *, check: bool = True
) -> AttentionRun:
    """Run a model over one text and keep some sites and how all of its heads attended.

    The attention is transformers' "eager" one meanwhile, the only one that tells its weights; at
    the first of the sites what it gives is compared with the model's own run, which `check` =
    False leaves out, of texts after the first.

    Raises InputError for an unknown site, a text of more than 1024 tokens, and a model whose
    attention tells no weights for some layer, or those of another computation.
    """
    if len(tokens) > LONGEST:
        raise InputError(
            "patterns of attention grow with the square of the tokens",
            where="tokens",
            given=len(tokens),
            allowed=f"up to {LONGEST}",
        )
    shape = (1, len(tokens))
    found: dict[str, Tensor] = {}
    watched = [_keeping(model.site_map.target(site), found, shape) for site in sites]
    with torch.no_grad(), multiplied_in(model.products), _eager(model.hf), watching(watched):
        output = model.hf.base_model(
            input_ids=torch.tensor([list(tokens)], device=model.device),
            use_cache=False,
            output_attentions=True,
        )
    missing = [site for site in sites if site not in found]
    if missing:
        raise InputError("this model's forward pass never reaches the site", where=missing[0])
    patterns = getattr(output, "attentions", None) or ()
    square = [
        isinstance(each, Tensor) and each.ndim == 4 and each.shape[-2:] == (len(tokens),) * 2
        for each in patterns
    ]
    if len(patterns) != model.n_layers or not all(square):
        raise InputError(
            "its attention tells no weights for some layer, so heads cannot be told apart by what "
            "they read",
            where=model.spec,
            given=f"{sum(square)} of {model.n_layers} layers",
        )
    if check:
        _check_same(model, tokens, sites[0], found[sites[0]])
    return AttentionRun(found, [each[0].double().cpu() for each in patterns])


def _keeping(target: HookTarget, found: dict[str, Tensor], shape: tuple[int, int]) -> Any:
    def see(value: Tensor | None) -> None:
        if value is not None and target.site not in found:
            found[target.site] = target.keep(value, shape)[0].double().cpu()

    return target, see


@contextmanager
def _eager(hf: Any) -> Iterator[None]:
    """While the context lasts, the attention that computes its weights one by one.

    Set in the configuration, which every layer and the mask look at: `set_attn_implementation`
    leaves some models (Falcon) as they were, and only logs it.
    """
    before = hf.config._attn_implementation
    hf.config._attn_implementation = "eager"
    try:
        yield
    finally:
        hf.config._attn_implementation = before


def _check_same(model: Model, tokens: Sequence[int], site: str, found: Tensor) -> None:
    """Raise InputError if the model's own run has something else at a site's last position."""
    own = model.capture(torch.tensor([list(tokens)]), [site])[site][0, -1].double().cpu()
    allowed = min(10 * TOLERANCE[model.dtype], _MOST)
    if not bool((found[-1] - own).norm() <= allowed * own.norm()):
        raise InputError(
            "the attention that tells its weights computes something else than the model's own",
            where=f"{model.spec}, {site}",
            given=f"relative difference {float((found[-1] - own).norm() / own.norm()):.2g}",
            allowed=f"up to {allowed:g}",
        )


@dataclass(frozen=True)
class HeadOutputs:
    """How the heads of a layer make its attention's output."""

    weight: Float[Tensor, "d_z d_model"]
    """W_O, float64"""
    bias: Float[Tensor, " d_model"] | None
    target: HookTarget
    """the site of what attention adds to the residual stream"""
    tolerance: float

    @classmethod
    def of(cls, model: Model, layer: int) -> "HeadOutputs":
        """Those of a layer. Raises InputError where heads do not end in one matrix."""
        projection: Any = model.site_map.target(f"blocks.{layer}.attn.hook_z").module
        weight = getattr(projection, "weight", None)
        transposed = (
            type(projection).__name__ == "Conv1D"
        )  # GPT-2 keeps [in, out], Linear [out, in]
        plain = isinstance(projection, nn.Linear) or transposed
        if not plain or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise InputError(
                "the heads' outputs do not end in one plain matrix",
                where=f"{model.spec}, layer {layer}",
                given=type(projection).__name__,
            )
        matrix = weight.detach().double().cpu()
        bias = None if projection.bias is None else projection.bias.detach().double().cpu()
        return cls(
            matrix if transposed else matrix.T,
            bias,
            model.site_map.target(f"blocks.{layer}.hook_attn_out"),
            TOLERANCE[model.dtype],
        )

    def up_to_scale(self) -> Float[Tensor, "d_z d_model"]:
        """What makes attention's output of the heads', biases left out, float64.

        W_O times the model's constant; where a norm stands behind the projection, times its gain,
        and at each position times that norm's scale there.

        Raises InputError for a norm that takes the mean off.
        """
        module = self.target.module
        if isinstance(module, nn.LayerNorm):
            raise InputError(
                "a norm that takes the mean off stands between the heads and the residual stream",
                where=self.target.site,
                given=type(module).__name__,
            )
        norm = normalised_target(self.target.site, module)
        made = self.weight * self.target.scale
        return made if norm is None else made * norm.gain.double().cpu()

    def multiplier(self, z: Tensor, attn_out: Tensor) -> Tensor:
        """m [d_model] with attn_out = m * (z W_O + b_O) at one position.

        It is a constant, or the gain and the scale that a norm behind the projection had there.

        Raises InputError where something else lies between.
        """
        projected = z @ self.weight
        projected = projected if self.bias is None else projected + self.bias
        scale = torch.full_like(projected, self.target.scale)
        if self._equal(projected * scale, attn_out):
            return scale
        norm = normalised_target(self.target.site, self.target.module)
        if norm is not None:
            gained = norm.gain.double().cpu() * scale
            direction = gained * projected
            frozen = gained * (direction @ attn_out / direction.square().sum())
            if self._equal(frozen * projected, attn_out):
                return frozen
        raise InputError(
            "what attention adds to the residual stream is not its heads' output through W_O, nor "
            "a norm of that without centring",
            where=self.target.site,
            given=type(self.target.module).__name__,
        )

    def _equal(self, made: Tensor, found: Tensor) -> bool:
        return bool((made - found).norm() <= self.tolerance * (made.norm() + found.norm()))
