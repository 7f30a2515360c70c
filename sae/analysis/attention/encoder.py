"""How a feature's pre-activation is made of what its SAE reads, in float64."""

from dataclasses import dataclass

from torch import Tensor

from activations import Model
from sae.analysis.attention.sums import SITES, sum_at
from sae.architectures._lista import refuse_lista
from sae.architectures.gated import GatedSAE
from sae.architectures.matching_pursuit import MatchingPursuitSAE
from sae.core.base import SparseAutoencoder
from sae.core.config import kind_of
from sae.data.model_placement import placement_in
from saescope.errors import InputError

_SAME = 1e-3
"""by how much, of the sum of the sizes of all terms, an SAE's activation may differ in rounding"""


def read_at(
    model: Model, sae: SparseAutoencoder, site: str | None, allow_other_model: bool
) -> tuple[SparseAutoencoder, str, int, str]:
    """The SAE in the model's units, the site that it reads, and that site's layer and name."""
    if not isinstance(model, Model):
        raise InputError(
            "only a language model's activations are taken apart",
            where="attribute",
            given=type(model).__name__,
        )
    if sae.concatenates:
        raise InputError("a crosscoder reads several sites at once", where="attribute")
    placement = placement_in(model, sae, site, allow_other_model=allow_other_model)
    (read,) = placement.read
    found = sum_at(read)
    if found is None:
        raise InputError(
            "what is read there is no sum over attention's heads and other parts",
            where="attribute",
            given=read,
            allowed=", ".join(f"blocks.N.{name}" for name in SITES),
        )
    return placement.sae, read, *found


@dataclass(frozen=True)
class Encoder:
    """How a feature's pre-activation is made of rows x [rows, d_in], in float64."""

    feature: int
    direction: Tensor
    encoder_bias: float
    decoder_bias: float
    sae: SparseAutoencoder

    @classmethod
    def of(cls, sae: SparseAutoencoder, feature: int) -> "Encoder":
        """Of an SAE in the model's units. Raises InputError if its features are no such product."""
        if isinstance(sae, MatchingPursuitSAE):
            raise InputError(
                "chooses features one after another, so none has a pre-activation of its own",
                where="attribute",
                given=kind_of(sae.config),
            )
        refuse_lista(sae, "attribute")
        direction = sae.W_enc_T[feature].detach().double().cpu()
        if isinstance(sae, GatedSAE):
            direction = direction * float(sae.r_mag[feature].double().exp())
        bias = sae.b_mag if isinstance(sae, GatedSAE) else sae.b_enc
        before = -float(sae.b_dec.detach().double().cpu() @ direction) if sae.pre_bias else 0.0
        if sae.normaliser.kind == "standardised":
            direction = direction - direction.mean()  # as good as taking each row's mean off
        return cls(feature, direction, float(bias[feature]), before, sae)

    def pre_activation(self, x: Tensor) -> Tensor:
        """[rows], in the model's units."""
        scale = self.sae.normaliser.row_scale(x)
        biases = (self.encoder_bias + self.decoder_bias) * scale
        return x @ self.direction + (biases[:, 0] if isinstance(biases, Tensor) else biases)

    def biases(self, x: Tensor) -> dict[str, float]:
        """What does not depend on x [d_in], but for its scale."""
        scale = float(self.sae.normaliser.row_scale(x))
        named = {"SAE encoder bias": self.encoder_bias, "SAE decoder bias": self.decoder_bias}
        return {name: value * scale for name, value in named.items()}

    def activation(self, x: Tensor, pre_activation: float, size: float) -> float:
        """The feature's activation at x [d_in], 0 where it does not fire.

        Raises InputError for an architecture whose activations are not its pre-activations.
        Args: size is the sum of the sizes of the pre-activation's terms.
        """
        like = self.sae.W_dec
        codes = self.sae.encode_sparse(x[None].to(like.device, like.dtype))
        found = float(codes.dense()[0, self.feature])
        if found and abs(found - pre_activation) > _SAME * size:
            raise InputError(
                "its activations are not its pre-activations, so they are no sum of parts",
                where="attribute",
                given=kind_of(self.sae.config),
            )
        return found
