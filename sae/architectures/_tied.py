"""SAEs whose encoder is their decoder transposed: one dictionary, W_enc = W_dec^T."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from sae.architectures._auxk import AuxKSAE
from saescope.errors import InputError


class TiedSAE(AuxKSAE):
    """Has one dictionary with unit rows, W_dec; W_enc_T is the same tensor.

    A scale that all coordinates share leaves it tied, because features are divided by that scale
    too. A scale for each site would not, and `fold` refuses it with an InputError.
    """

    has_encoder_bias: ClassVar[bool] = True
    """whether b_enc is a parameter; otherwise it is a buffer of zeros"""

    def make_parameters(self) -> None:
        """Create W_dec and b_dec, and b_enc if there is one."""
        if self.d_out != self.d_in:
            raise InputError(
                "a tied SAE reconstructs what it reads",
                where="sae",
                given=f"d_out {self.d_out}",
                allowed=f"d_out {self.d_in}",
            )
        if self.has_encoder_bias:
            self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        else:
            self.register_buffer("b_enc", torch.zeros(self.d_sae), persistent=False)
        self.W_dec = nn.Parameter(torch.empty(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    @property
    def W_enc_T(self) -> Tensor:  # type: ignore[override]
        """The dictionary [d_sae, d_in], which encodes and decodes."""
        return self.W_dec

    def fold_parameters(self, feature_scale: float) -> None:
        """Refuse what would untie the dictionary; called on the folded copy."""
        super().fold_parameters(feature_scale)
        if self.normaliser.scale.ndim or self.output_normaliser is not None:
            raise InputError(
                "would untie the dictionary",
                where="sae.fold",
                given="a scale for each site",
                allowed="one scale",
            )
