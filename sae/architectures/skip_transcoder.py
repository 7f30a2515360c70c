"""Skip transcoder: a transcoder with a linear path beside its features (Paulo et al. 2025).

f = act(W_enc^T y + b_enc),   t_hat = f W_dec + y W_skip + b_dec
The losses are those of `_transcoding`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from sae.architectures import register
from sae.architectures._transcoding import Transcoding, TranscodingConfig
from sae.core.base import SAEConfig
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SkipTranscoderConfig(TranscodingConfig):
    """Configuration of the skip transcoder."""

    kind: Literal["skip_transcoder"] = "skip_transcoder"
    """Name of the architecture."""


@register
class SkipTranscoder(Transcoding):
    """Predicts the output site from the features and, linearly, from the input; W_skip starts at 0.

    W_skip is [d_in, d_out].
    """

    Config: ClassVar[type[SAEConfig]] = SkipTranscoderConfig
    config: SkipTranscoderConfig

    def make_parameters(self) -> None:
        """A transcoder's parameters, and W_skip."""
        super().make_parameters()
        self.W_skip = nn.Parameter(torch.zeros(self.d_in, self.d_out))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As a transcoder; W_skip 0."""
        super().reset_parameters()
        nn.init.zeros_(self.W_skip)

    def plain_parts(self) -> dict[str, Any]:
        """A transcoder's, and W_skip."""
        return {**super().plain_parts(), "W_skip": self.W_skip}

    def decode_normalised(self, codes: SparseCodes, y: Tensor | None = None) -> Tensor:
        """Prediction [batch, d_out]; y [batch, d_in] is what was encoded.

        Raises InputError without it.
        """
        if y is None:
            raise InputError(
                "the skip path needs the activations that the codes came from",
                where="decode(codes, like=x)",
            )
        return super().decode_normalised(codes) + y @ self.W_skip

    @torch.no_grad()
    def fold_parameters(self, feature_scale: float) -> None:
        """With y = (x - m) s: W_skip' = s W_skip / s_out, and b_dec' loses m W_skip'."""
        super().fold_parameters(feature_scale)
        inside, outside = self.normaliser, self.normaliser_out
        by_input = inside.scale
        if by_input.ndim:  # sites side by side have a scale each
            by_input = rearrange(by_input, "d_in -> d_in 1")
        self.W_skip.mul_(by_input).div_(outside.scale)
        self.b_dec.sub_(inside.mean @ self.W_skip)
