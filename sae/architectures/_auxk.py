"""AuxK, shared by the architectures that have it: dead features learn to predict the residual."""

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from sae.core import losses
from sae.core.base import SAEConfig, SparseAutoencoder, TrainingState
from sae.core.losses import Reconstruction
from sae.distributed import FEATURES
from saescope.errors import check_range


@dataclass(frozen=True, kw_only=True)
class AuxKConfig(SAEConfig):
    """The fields of AuxK."""

    auxk_coefficient: float = 1 / 32
    """Weight of the AuxK loss; 0 turns it off."""
    k_aux: int | None = None
    """Dead features used by AuxK a token; half of d_in if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.auxk_coefficient", self.auxk_coefficient, low=0)
        if self.k_aux is not None:
            check_range("sae.k_aux", self.k_aux, low=1)


class AuxKSAE(SparseAutoencoder):
    """An SAE whose dead features are revived by AuxK."""

    signed_auxk: ClassVar[bool] = False
    """AuxK chooses dead features by magnitude, and does not rectify them"""
    refits_visible: ClassVar[bool] = False
    """where coordinates are hidden, codes are those of the dictionary's visible part"""

    @property
    def k_aux(self) -> int:
        """Features that predict the residual of a row."""
        return cast(AuxKConfig, self.config).k_aux or max(1, self.d_in // 2)

    def add_auxk(
        self,
        loss: Tensor,
        terms: dict[str, Tensor],
        centred: Tensor,
        found: Reconstruction,
        state: TrainingState,
    ) -> Tensor:
        """The loss with its AuxK term added, which is also put into `terms`."""
        config = cast(AuxKConfig, self.config)
        if not config.auxk_coefficient:
            return loss
        term = loss.new_zeros(())
        if FEATURES.total(int(state.dead.any())):  # of any rank
            term = losses.auxk(
                found.left_over(),
                centred,
                self.W_enc_T,
                self.b_enc,
                self.W_dec,
                state.dead,
                self.k_aux,
                signed=self.signed_auxk,
                visible=found.batch.visible,
                refit=self.refits_visible,
                size=found.batch.target,
            )
        terms["auxk"] = term.detach()
        return loss + config.auxk_coefficient * term
