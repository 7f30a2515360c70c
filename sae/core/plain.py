"""An SAE as plain weights and a selection rule: what other libraries' formats can hold.

    f = act((x - b_dec) W_enc + b_enc),   x_hat = f W_dec + b_dec (+ x W_skip)

with x - b_dec or x alone (`pre_bias`). Both forms are the same function: (x - b) W + c = x W + c'
with c' = c - b W.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from saescope.errors import InputError

Rule = Literal["relu", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit"]
"""how features are chosen; also the name of the architecture that such files are read to"""


@dataclass(frozen=True, kw_only=True)
class PlainSAE:
    """Weights in float32 and the rule that they are used by."""

    activation: Rule
    W_dec: Tensor
    """[d_sae, d_out]"""
    b_dec: Tensor
    """[d_out]"""
    W_enc: Tensor | None = None
    """[d_in, d_sae]; none for matching pursuit"""
    b_enc: Tensor | None = None
    """[d_sae]; none for gated and matching pursuit"""
    pre_bias: bool = True
    """the encoder sees x - b_dec, not x"""
    threshold: Tensor | None = None
    """[d_sae], jumprelu: a feature fires where its pre-activation is above"""
    b_gate: Tensor | None = None
    """[d_sae], gated"""
    b_mag: Tensor | None = None
    """[d_sae], gated"""
    r_mag: Tensor | None = None
    """[d_sae], gated: magnitudes use W_enc exp(r_mag)"""
    k: int | None = None
    """topk, abstopk"""
    W_skip: Tensor | None = None
    """[d_in, d_out], transcoders"""
    transcoder: bool = False
    """what is reconstructed is another site than what is read"""
    standardised: bool = False
    """each vector is brought to mean 0 and (population) deviation 1 first, and back afterwards"""
    pursuit: dict[str, Any] | None = None
    """matching pursuit: k steps, and residual_threshold and stop_on_duplicate if they end it"""

    @classmethod
    def of(cls, **given: Any) -> Self:
        """From the fields by name; tensors may have another float type, or gradients."""
        tensors = {n: v.detach().float() for n, v in given.items() if isinstance(v, Tensor)}
        return cls(**{**given, **tensors})

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return len(self.W_enc) if self.W_enc is not None else self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.W_dec)

    def bias_input(self) -> Tensor:
        """b_dec W_enc [d_sae], in float64, rounded once: what moves when `pre_bias` changes."""
        assert self.W_enc is not None
        return (self.b_dec.double() @ self.W_enc.double()).float()

    def with_pre_bias(self, wanted: bool) -> Self:
        """The same function, with or without b_dec subtracted from the input."""
        if wanted == self.pre_bias or self.W_enc is None:
            return self
        return replace(self.shift_encoder(1 if wanted else -1), pre_bias=wanted)

    def shift_encoder(self, sign: int) -> Self:
        """Encoder biases moved by sign * b_dec W_enc."""
        moved = sign * self.bias_input()
        if self.activation != "gated":
            return replace(self, b_enc=_given(self.b_enc) + moved)
        return replace(
            self,
            b_gate=_given(self.b_gate) + moved,
            b_mag=_given(self.b_mag) + moved * _given(self.r_mag).exp(),
        )

    def scale_input(self, scale: float) -> Self:
        """For inputs that used to be multiplied by `scale` first: it is put into the weights.

        Feature activations keep their values, and reconstructions are in the new inputs' units.
        Matching pursuit reads with its decoder's rows, which stay: its features are divided.
        """
        if scale == 1:
            return self
        if self.pursuit is not None:
            stop = self.pursuit.get("residual_threshold", 0.0)
            return replace(
                self,
                b_dec=self.b_dec / scale,
                pursuit={**self.pursuit, "residual_threshold": stop / scale},
            )
        if self.transcoder:
            raise InputError(
                "a transcoder's output has a scale of its own", where="input_scale", given=scale
            )
        return replace(
            self,
            W_enc=_given(self.W_enc) * scale,
            W_dec=self.W_dec / scale,
            b_dec=self.b_dec / scale,
        )

    def fold_decoder_norm(self) -> Self:
        """For a rule that counts pre-activations times their decoder rows' norm: rows of norm 1."""
        norm = self.W_dec.norm(dim=1)
        divisor = torch.where(norm > 0, norm, 1.0)  # a row of zeros stays one: no NaN
        return replace(
            self,
            W_enc=_given(self.W_enc) * norm,
            b_enc=_given(self.b_enc) * norm,
            W_dec=self.W_dec / divisor[:, None],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, contiguous."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {n: v.detach().contiguous() for n, v in found.items() if isinstance(v, Tensor)}


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
