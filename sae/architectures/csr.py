"""CSR: tied TopK with a contrastive term on the codes (Wen et al. 2025, arXiv 2503.01776).

z = ReLU(TopK_k(W (y - b_dec) + b_enc)),   y_hat = W^T z + b_dec
loss = FVU(k) + 1/8 FVU(4k) + 1/32 AuxK + gamma L_cl
L_cl = - mean_i mean_{p in P(i)} log( exp(s_ip) / sum_{a in A(i)} exp(s_ia) ),   s_ij = z_i z_j / T
with z of unit length and T = 0.2, as in the authors' code, or as they are.

P(i) is i itself, with A(i) the whole batch; under positives = "class" it is the other rows of i's
class, where there are any, with A(i) everything but i (supervised contrastive loss, Khosla et al.
2020, eq. 2). A row and itself are not two views of anything: with positives = "self" the term only
pushes the codes of different rows apart. It is a uniformity term, not a contrast.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae import kernels
from sae.architectures import register
from sae.architectures._tied import TiedSAE
from sae.architectures._topk import TopKFamily, TopKFields
from sae.base import SAEConfig
from sae.batch import TrainingBatch
from sae.codes import SparseCodes
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class CSRConfig(TopKFields):
    """Configuration of the CSR architecture."""

    kind: Literal["csr"] = "csr"
    """Name of the architecture."""
    multi_topk_coefficient: float = 1 / 8
    """Weight of the loss at 4k features."""
    gamma: float = 0.1
    """Weight of the contrastive term; 0 turns it off."""
    temperature: float = 0.2
    """T, what similarities are divided by."""
    unit_codes: bool = True
    """Similarities are of codes scaled to unit length."""
    positives: Literal["self", "class"] = "self"
    """What a row is drawn to: itself, or the other rows of its class, which needs labelled data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.gamma", self.gamma, low=0)
        check_range("sae.temperature", self.temperature, above=0)
        if self.positives not in ("self", "class"):
            raise InputError(
                "no such positives", where="sae.positives", given=self.positives,
                allowed=("self", "class"),
            )  # fmt: skip


@register
class CSRSAE(TiedSAE, TopKFamily):
    """One unit-norm dictionary that encodes and decodes, with codes spread over the sphere."""

    Config: ClassVar[type[SAEConfig]] = CSRConfig
    config: CSRConfig

    def more_loss(
        self, loss: Tensor, terms: dict[str, Tensor], codes: SparseCodes, batch: TrainingBatch
    ) -> Tensor:
        """The loss with the contrastive term added."""
        config = self.config
        if not config.gamma:
            return loss
        labels = None
        if config.positives == "class":
            if batch.labels is None:
                raise InputError(
                    "needs a class for each row", where="sae.positives", given="class",
                    allowed="self, or data with labels",
                )  # fmt: skip
            labels = batch.labels
        logits = similarities(codes, unit=config.unit_codes) / config.temperature
        term = contrastive_loss(logits, labels)
        terms["contrastive"] = term.detach()
        return loss + config.gamma * term


def similarities(codes: SparseCodes, *, unit: bool) -> Tensor:
    """Inner products of all rows' codes [batch, batch], of unit length if asked.

    Costs batch^2 k multiplications and d_sae x batch numbers of memory.
    """
    value = codes.value
    if unit:
        rows = codes.rows()
        square = value.new_zeros(codes.batch).index_add(0, rows, value.square())
        # of a row without features nothing is to be divided, nor any gradient to be had
        scale = square.clamp_min(torch.finfo(value.dtype).tiny).rsqrt() * (square > 0)
        value = value * scale[rows]
    fixed = SparseCodes(codes.row_ptr, codes.index, value.detach(), codes.d_sae).dense().T
    half = kernels.decode(codes.row_ptr, codes.index, value, fixed.contiguous())
    # z z^T with one factor held fixed has half the gradient: the transpose has the other half
    return half + half.T - half.detach()


def contrastive_loss(logits: Tensor, labels: Tensor | None) -> Tensor:
    """L_cl of the file's heading from logits [batch, batch]; labels int64 [batch], -1 for none."""
    batch = len(logits)
    itself = torch.eye(batch, dtype=torch.bool, device=logits.device)
    if labels is None:
        return (logits.logsumexp(1) - logits.diagonal()).mean()
    mates = (labels[:, None] == labels) & (labels >= 0)[:, None] & ~itself
    has_mates = mates.any(1, keepdim=True)
    positive = torch.where(has_mates, mates, itself)
    log_sum = logits.masked_fill(itself & has_mates, -torch.inf).logsumexp(1)
    drawn = (logits * positive).sum(1) / positive.sum(1)
    return (log_sum - drawn).mean()
