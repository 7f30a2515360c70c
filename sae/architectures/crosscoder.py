"""Crosscoder: one set of features read from, and written to, several sites at once.

Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing":
    f = act(sum_l W_enc^l T y^l + b_enc),   y_hat^l = f W_dec^l + b_dec^l
    loss = sum_l ||y^l - y_hat^l||^2 + lambda * sum_i f_i sum_l ||W_dec,i^l||
y is the sites' activations side by side, each at its own scale (`Normaliser.side_by_side`), so the
sums over sites are ordinary products. The loss is stated over the variance, the penalty over its
square root and the number of sites' (one lambda then serves any number of them). act is ReLU; or
TopK (with AuxK) over the features of a row or BatchTopK over those of a batch, which choose by
w_i f_i with w_i = sum_l ||W_dec,i^l||, what the penalty counts (BatchTopK crosscoders: Minder et
al. 2025, section 3).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from sae import kernels
from sae.architectures import register
from sae.architectures._auxk import AuxKConfig, AuxKSAE
from sae.architectures._l1 import L1WeightConfig
from sae.architectures._thresholds import calibrated_threshold, running_mean_, smallest_of
from sae.core.base import SAEConfig, TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.distributed import ROWS
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_choice, check_range

Activation = Literal["relu", "topk", "batchtopk"]
_EMA_DECAY = 0.99
"""of the running mean of BatchTopK's smallest chosen value"""


@dataclass(frozen=True, kw_only=True)
class CrosscoderConfig(AuxKConfig, L1WeightConfig):
    """Configuration of the crosscoder; the fields of AuxK are for activations that have a k,
    those of the L1 penalty for relu."""

    kind: Literal["crosscoder"] = "crosscoder"
    """Name of the architecture."""
    activation: Activation = "relu"
    """Which features fire: relu (all above 0, kept few by an L1 penalty), topk (the k largest of a
    token), or batchtopk (the k times batch largest of a batch)."""
    k: float = 32.0
    """Features kept a token (L0), with activation topk, or on average, with batchtopk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("no such activation", "sae.activation", self.activation, get_args(Activation))
        check_range("sae.k", self.k, above=0)
        if self.activation != "relu":
            check_range("sae.k", self.k, above=0, high=self.d_sae)
        if self.activation == "topk" and self.k != round(self.k):
            raise InputError(
                "must be whole where it is kept of every token",
                where="sae.k",
                given=self.k,
                allowed=f"{round(self.k)}, or activation batchtopk",
            )

    def with_target_l0(self, target: float) -> Self:
        """The same with k at `target`; unchanged where the penalty sets the L0."""
        return self if self.activation == "relu" else super().with_target_l0(target)


@register
class Crosscoder(AuxKSAE):
    """Sites side by side; `metadata` has their names ("sites") and widths ("site_widths").

    Without them it is taken to be of one site. `norm_scale` [d_out] turns decoder rows into units
    of the sites' training scales, so that what counts decoder norms (selection, penalty, relative
    norms) is the same before and after folding.
    """

    Config: ClassVar[type[SAEConfig]] = CrosscoderConfig
    config: CrosscoderConfig
    concatenates: ClassVar[bool] = True
    pre_bias: ClassVar[bool] = False
    unit_decoder: ClassVar[bool] = False
    full_precision: ClassVar[tuple[str, ...]] = ("threshold",)
    norm_scale: Tensor
    threshold: Tensor
    threshold_updates: Tensor

    @property
    def batch_level(self) -> bool:  # type: ignore[override]
        """BatchTopK selects over a batch in training, by a threshold at inference."""
        return self.config.activation == "batchtopk"

    @property
    def penalised(self) -> bool:  # type: ignore[override]
        """With ReLU, sparsity comes from a penalty."""
        return self.config.activation == "relu"

    def make_parameters(self) -> None:
        """W_enc_T, b_enc, W_dec, b_dec; norm_scale; BatchTopK's threshold on w_i f_i, [].

        Raises InputError if what is written is not as wide as what is read.
        """
        if self.d_in != self.d_out:
            raise InputError(
                "a crosscoder writes the sites that it reads",
                where="d_out",
                given=self.d_out,
                allowed=str(self.d_in),
            )
        super().make_parameters()
        self._last_bar = 0.0  # the smallest w_i f_i chosen in the last batch
        self.register_buffer("norm_scale", torch.ones(self.d_out))
        if self.config.activation == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))
            self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def start(self, batch: TrainingBatch) -> None:
        """b_dec at the median; pre-activations of mean 0, as there is no pre-encoder bias."""
        super().start(batch)
        self.b_enc.copy_(-(self.W_enc_T * batch.y.mean(0)).sum(1))

    # ---- sites ------------------------------------------------------------------------------

    @property
    def widths(self) -> list[int]:
        """Width of each site; InputError if they do not add up to d_in."""
        widths = [int(width) for width in self.metadata.get("site_widths") or [self.d_in]]
        if sum(widths) != self.d_in:
            raise InputError(
                "the sites' widths do not add up",
                where="site_widths",
                given=widths,
                allowed=f"{self.d_in} in all",
            )
        return widths

    @property
    def columns(self) -> dict[str, slice]:
        """Where each site stands in x; InputError if names and widths do not go together."""
        widths = self.widths
        names = self.metadata.get("sites") or [str(self.metadata.get("site", "all"))]
        if len(names) != len(widths):
            raise InputError("one width a site", where="site_widths", given=widths, allowed=names)
        ends = torch.tensor(widths).cumsum(0).tolist()
        return {
            name: slice(end - width, end)
            for name, width, end in zip(names, widths, ends, strict=True)
        }

    def site_norms(self) -> Tensor:
        """||W_dec,i^l|| [d_sae, sites], in units of each site's training scale."""
        widths = self.widths
        scale = torch.stack([of_site[0] for of_site in self.norm_scale.split(widths)])
        norms = [of_site.norm(dim=1) for of_site in self.W_dec.split(widths, dim=1)]
        return torch.stack(norms, dim=1) * scale.to(self.W_dec)

    def decoder_directions(self) -> Tensor:
        """Decoder rows at the sites' training scales: no site decides by its size."""
        return self.W_dec * self.norm_scale

    @torch.no_grad()
    def relative_norms(self) -> Tensor:
        """Each site's share of a feature's decoder norms [d_sae, sites]; rows sum to 1.

        Of two sites, the relative norm of Lindsey et al. 2024, "Model diffing". 0 for a feature
        without any.
        """
        norms = self.site_norms()
        return norms / norms.sum(1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)

    def at(self, site: str) -> Self:
        """Raises InputError: a crosscoder cannot be used at one of its sites alone."""
        raise InputError(
            "a crosscoder reads all its sites at once",
            where="sae.at",
            given=site,
            allowed="no single site",
        )

    # ---- codes ------------------------------------------------------------------------------

    def _above(self, y: Tensor, bar: Tensor | float) -> SparseCodes:
        return SparseCodes(*kernels.encode_above(y, self.W_enc_T, self.b_enc, bar), self.d_sae)

    def _weight(self) -> Tensor:
        """w [d_sae], what activations are compared by; above 0, without gradient."""
        weight = self.site_norms().detach().sum(1)
        return weight.clamp_min(torch.finfo(weight.dtype).eps)

    def _largest(self, y: Tensor) -> SparseCodes:
        # the k largest of w f are those of an encoder whose rows are w times as long
        weight, k = self._weight(), int(self.config.k)
        index, value = kernels.encode_topk(
            y, self.W_enc_T * weight[:, None], self.b_enc * weight, k
        )
        return SparseCodes.from_fixed(index, value / weight[index], self.d_sae)

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in], row by row; BatchTopK by its stored threshold."""
        if self.config.activation == "topk":
            return self._largest(y)
        if self.config.activation == "batchtopk":
            return self._above(y, (self.threshold / self._weight()).clamp_min(0))
        return self._above(y, 0.0)

    def _training_codes(self, y: Tensor) -> SparseCodes:
        if self.config.activation != "batchtopk":
            return self.encode_normalised(y)
        budget = max(1, round(self.config.k * ROWS.total(len(y))))
        weight = self._weight()
        row_ptr, index, value = kernels.encode_top_of_batch(
            y, self.W_enc_T, self.b_enc, budget, weight=weight, hint=self._last_bar
        )
        smallest = smallest_of(value * weight[index])
        if smallest.isfinite():
            self._last_bar = float(smallest)
            if self.training:
                running_mean_(self.threshold, smallest, self.threshold_updates, _EMA_DECAY)
        return SparseCodes(row_ptr, index, value, self.d_sae)

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """FVU over all sites, with the L1 penalty or with AuxK."""
        config = self.config
        centred = self.centred(batch)
        codes = self._training_codes(centred)
        found = self.reconstruct(codes, batch)
        loss, terms = found.loss, {"fvu": found.loss.detach()}
        if config.activation == "relu":
            norms = self.site_norms()
            unit = (norms.shape[1] * batch.variance) ** 0.5
            penalty = batch.mean(codes.value * norms.sum(1).index_select(0, codes.index)) / unit
            loss = loss + config.l1_weight(state) * penalty
            terms["l1"] = penalty.detach()
        else:
            loss = self.add_auxk(loss, terms, centred, found, state)
        return TrainingOutput(loss, terms, codes.counts(), found)

    @torch.no_grad()
    def calibrate(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        """BatchTopK's threshold, such that the mean L0 over rows y [n, d_in] is k.

        Raises InputError without rows.
        """
        if self.config.activation != "batchtopk":
            return
        self.threshold.fill_(calibrated_threshold(self, rows, self._weight(), self.config.k))

    @torch.no_grad()
    def fold_parameters(self, feature_scale: float) -> None:
        """Decoder rows come out in the sites' own units; norm_scale keeps their training scale."""
        super().fold_parameters(feature_scale)
        self.norm_scale.mul_(self.normaliser_out.scale)
