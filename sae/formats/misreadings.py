"""Other ways of reading an SAE's weights: the mistakes that converters make, each undone.

Every reading is the SAE as it would be if one fact about its file were otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.core.plain import PlainSAE
from sae.evaluation.rows import Coder
from sae.formats._claim import Claim
from sae.formats._ours import sae_of
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The SAE read another way."""

    wrong: str
    """what is wrong with the SAE as it was read, if this is right"""
    sae: Coder
    fitted: bool = False
    """it was made so that its L0 is the claimed one"""
    of_bias: bool = False
    """it differs in whether b_dec is subtracted from the input"""


@dataclass(frozen=True)
class Rescaled:
    """An SAE whose inputs are first moved and scaled, and its outputs back."""

    sae: SparseAutoencoder
    scale: Tensor | float
    shift: Tensor | float = 0.0
    per_row: bool = False
    """each row to mean 0 and deviation 1, whatever scale and shift"""

    def _of(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if not self.per_row:
            return self.scale, self.shift
        return 1 / x.std(1, correction=0, keepdim=True).clamp_min(1e-5), x.mean(1, keepdim=True)

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Codes of x [n, d_in]."""
        scale, shift = self._of(x)
        return self.sae.encode_sparse((x - shift) * scale)

    def decode(self, codes: SparseCodes, like: Tensor) -> Tensor:
        """Reconstructions [n, d_in]."""
        scale, shift = self._of(like)
        return self.sae.decode(codes, like=(like - shift) * scale) / scale + shift


@torch.no_grad()
def readings(sae: SparseAutoencoder, x: Tensor, claim: Claim | None) -> Iterator[Reading]:
    """The SAE's weights read in every other way known; x [n, d_in] are reference rows."""
    try:
        plain = sae.plain()
    except InputError:  # no linear encoder with a rule: only its input can be read otherwise
        plain = None
    if plain is not None:
        yield from _biases(plain)
        yield from _rules(plain, x, claim)
        yield from _transposed(plain)
    if not sae.transcodes:
        yield from _scales(sae, x)


def _biases(plain: PlainSAE) -> Iterator[Reading]:
    if plain.W_enc is None or plain.transcoder:
        return
    for sign, wrong in (
        (1, "b_dec is subtracted from the input and should not be"),
        (-1, "b_dec is not subtracted from the input and should be"),
    ):
        yield Reading(wrong=wrong, sae=sae_of(plain.shift_encoder(sign)), of_bias=True)


def _rules(plain: PlainSAE, x: Tensor, claim: Claim | None) -> Iterator[Reading]:
    if plain.b_enc is None:
        return
    relu = replace(plain, activation="relu", threshold=None, k=None)
    has_threshold = plain.threshold is not None and bool(plain.threshold.any())
    if has_threshold:
        yield Reading(
            wrong="the architecture: its thresholds are not to be used (a ReLU SAE)",
            sae=sae_of(relu),
        )
    elif plain.activation != "relu":
        yield Reading(wrong=f"the architecture: {plain.activation} for ReLU", sae=sae_of(relu))
    if claim is None or claim.l0 is None:
        return
    k = round(claim.l0)
    if 1 <= k <= plain.d_sae and not plain.transcoder and k != plain.k:
        what = f"k, {plain.k}" if plain.k else f"the architecture, {plain.activation}"
        yield Reading(
            wrong=f"{what}: it is a TopK SAE with k = {k}",
            sae=sae_of(replace(relu, activation="topk", k=k)),
            fitted=True,
        )
    if plain.activation == "topk" or has_threshold:
        return
    threshold = _threshold_for(sae_of(relu), x, claim.l0)
    if threshold is not None:
        thresholds = torch.full((plain.d_sae,), threshold)
        yield Reading(
            wrong=f"its threshold is lost (a BatchTopK or JumpReLU SAE; about {threshold:.3g})",
            sae=sae_of(replace(relu, activation="jumprelu", threshold=thresholds)),
            fitted=True,
        )


def _threshold_for(relu: SparseAutoencoder, x: Tensor, l0: float) -> float | None:
    """The one threshold at which rows x have a mean L0; None if they never have so many."""
    value = relu.encode_sparse(x).compact().value
    wanted = round(l0 * len(x))
    if not 0 < wanted < len(value):
        return None
    return float(value.topk(wanted + 1).values[-1])


def _transposed(plain: PlainSAE) -> Iterator[Reading]:
    """A square matrix fits either way round."""
    for name in ("W_enc", "W_dec"):
        value = getattr(plain, name)
        if value is not None and value.shape[0] == value.shape[1]:
            turned = replace(plain, **{name: value.T.contiguous()})
            yield Reading(wrong=f"{name} is transposed", sae=sae_of(turned))


def _scales(sae: SparseAutoencoder, x: Tensor) -> Iterator[Reading]:
    exact = x.double()
    norm = float(exact.norm(dim=1).mean())
    root_mean_square = float(exact.square().sum(1).mean()) ** 0.5
    mean = x.float().mean(0)
    deviation = float((exact - exact.mean(0)).square().sum(1).mean()) ** 0.5
    lost = "a scale of the input that was never folded into the weights"
    twice = "a scale of the input that was folded into the weights and is not to be"
    for scale, name in (
        (sae.d_in**0.5 / norm, "sqrt(d_in) over the mean norm"),
        (1 / root_mean_square, "one over the root mean square norm"),
    ):
        yield Reading(wrong=f"{lost}: {scale:.4g}, {name}", sae=Rescaled(sae, scale))
        yield Reading(wrong=f"{twice}: {name}, {scale:.4g}", sae=Rescaled(sae, 1 / scale))
    yield Reading(
        wrong="the mean, which is to be taken off the input, and its scale",
        sae=Rescaled(sae, 1 / deviation, mean),
    )
    yield Reading(
        wrong="a normaliser is lost: each vector is to be brought to mean 0 and deviation 1",
        sae=Rescaled(sae, 1.0, per_row=True),
    )
