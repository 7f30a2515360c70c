"""TopK SAE with AuxK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

f = ReLU(TopK_k(W_enc^T (y - b_dec) + b_enc)),   y_hat = f W_dec + b_dec
loss = FVU(f) + 1/32 AuxK,   AuxK = ||e - e_hat||^2 / ||e - mean e||^2,   e = y - y_hat

e_hat is what the k_aux strongest dead features make of e, so that they learn what the others leave
(appendix A.2 there; `sae.core.losses.auxk`). Options: Multi-TopK adds 1/8 of the FVU of the codes
with 4k features (section 6.3), k may fall from k_start in the first part of a run, and features may
be chosen again after a LISTA step (`_lista`).

W_enc, b_enc, W_dec and b_dec, their start, unit decoder rows, scales and files are every SAE's:
`sae.core.base`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from sae import kernels
from sae.architectures import register
from sae.architectures._auxk import AuxKConfig, AuxKSAE
from sae.architectures._falling_k import falling
from sae.architectures._lista import ListaConfig, check_fits, refuse_lista, step_size, stepped
from sae.core.base import SAEConfig, TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.plain import Rule
from sae.kernels import global_topk
from sae.kernels.codes import SparseCodes
from saescope.errors import check_range


@dataclass(frozen=True, kw_only=True)
class TopKFields(AuxKConfig):
    """The fields of TopK, and of the architectures that are built on it."""

    k: int = 32
    """Features kept a token (L0)."""
    k_start: int | None = None
    """Features kept at the first step, falling linearly to k; k throughout if not given. Steps cost
    in proportion to the features kept."""
    k_anneal_fraction: float = 0.5
    """Fraction of the run over which k falls from k_start."""
    multi_topk_coefficient: float = 0.0
    """Weight of the Multi-TopK loss (1/8 in Gao et al. 2024); 0 turns it off."""
    multi_topk: int = 4
    """The Multi-TopK loss keeps this many times k features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_k("k", self.k)
        if self.k_start is not None:
            check_range("sae.k_start", self.k_start, low=self.k)
            self.check_k("k_start", self.k_start)
        check_range("sae.k_anneal_fraction", self.k_anneal_fraction, low=0, high=1)
        check_range("sae.multi_topk_coefficient", self.multi_topk_coefficient, low=0)
        check_range("sae.multi_topk", self.multi_topk, low=2)


@dataclass(frozen=True, kw_only=True)
class TopKConfig(TopKFields, ListaConfig):
    """Configuration of the TopK architecture."""

    kind: Literal["topk"] = "topk"
    """Name of the architecture."""


@register
class TopKSAE(AuxKSAE):
    """Keeps the k largest pre-activations of each token; subclasses may choose by another rule."""

    Config: ClassVar[type[SAEConfig]] = TopKConfig
    config: TopKFields
    by_feature: ClassVar[tuple[str, ...]] = ("W_enc_T", "b_enc", "W_dec")
    plain_rules: ClassVar[tuple[Rule, ...]] = ("topk",)

    def top(self, centred: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k features kept of each row and their activations: (index, value) [batch, k]."""
        return kernels.encode_topk(centred, self.W_enc_T, self.b_enc, k)

    def make_parameters(self) -> None:
        """As every SAE's; InputError for a LISTA step that does not fit it."""
        check_fits(self)
        super().make_parameters()

    def after_lista(
        self, centred: Tensor, k: int, mask: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The encoder's input, after the LISTA step with k features if there is one."""
        eta = step_size(self.config)
        if not eta:
            return centred
        first = SparseCodes.from_fixed(*self.top(centred, k), self.d_sae)
        return stepped(centred, first, self.W_dec, eta, mask)

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in], 0 where fewer than k pre-activations are positive."""
        k = self.config.k
        centred = self.after_lista(self.encoder_input(y), k)
        # with the features on several ranks, each finds its own k best, and then all compare
        index, value = self.top(centred, min(k, self.d_sae))
        return global_topk.strongest(index, value, k, self.d_sae)

    def k_at(self, state: TrainingState) -> int:
        """Features kept at this step of the run."""
        config = self.config
        if config.k_start is None:
            return config.k
        return round(falling(config.k_start, config.k, config.k_anneal_fraction, state))

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """FVU + coefficient * AuxK + coefficient * Multi-TopK (Gao et al. 2024, sections 2, 6)."""
        config = self.config
        k = self.k_at(state)
        centred = self.after_lista(self.centred(batch), k, batch.mask_input)  # of y - b_dec
        # one selection serves both losses: of the widest codes, the k strongest
        wide = min(config.multi_topk * k, config.d_sae) if config.multi_topk_coefficient else k
        index, value = self.top(centred, min(wide, self.d_sae))
        codes = wide_codes = global_topk.strongest(index, value, wide, self.d_sae)
        if wide > k:
            codes = global_topk.strongest(index, value, k, self.d_sae)
        found = self.reconstruct(codes, batch)  # y_hat = f W_dec + b_dec, and its FVU
        terms = {"fvu": found.loss.detach()}
        loss = self.add_auxk(found.loss, terms, centred, found, state)
        if config.multi_topk_coefficient:
            multi = self.reconstruct(wide_codes, batch).loss
            terms["multi_topk"] = multi.detach()
            loss = loss + config.multi_topk_coefficient * multi
        loss = self.add_own_loss(loss, terms, codes, batch)
        return TrainingOutput(loss, terms, codes.counts(), found)

    def add_own_loss(
        self, loss: Tensor, terms: dict[str, Tensor], codes: SparseCodes, batch: TrainingBatch
    ) -> Tensor:
        """The loss with a subclass's own term added, which is also put into `terms`."""
        del terms, codes, batch
        return loss

    def plain_parts(self) -> dict[str, Any]:
        """TopK's rule, as other libraries know it."""
        refuse_lista(self, "sae")
        (rule,) = self.plain_rules
        return {"activation": rule, "k": self.config.k, "b_enc": self.b_enc}
