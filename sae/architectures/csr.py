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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sae import kernels
from sae.architectures import register
from sae.architectures._tied import TiedSAE
from sae.architectures.topk import TopKFields, TopKSAE
from sae.core.base import SAEConfig
from sae.core.batch import TrainingBatch
from sae.distributed import ROWS
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_choice, check_range

_CHUNK_ELEMENTS = 2**22
"""of dense codes held at a time"""


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
        check_choice("no such positives", "sae.positives", self.positives, ("self", "class"))

    @property
    def needs_labels(self) -> bool:
        """What is drawn together by class needs a class of each row."""
        return self.positives == "class"


@register
class CSRSAE(TiedSAE, TopKSAE):  # type: ignore[misc]
    """One unit-norm dictionary that encodes and decodes, with codes spread over the sphere."""

    Config: ClassVar[type[SAEConfig]] = CSRConfig
    config: CSRConfig  # type: ignore[assignment]
    by_feature: ClassVar[tuple[str, ...]] = ()

    def add_own_loss(
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
                    "needs a class for each row",
                    where="sae.positives",
                    given="class",
                    allowed="self, or data with labels",
                )
            labels = ROWS.gather(batch.labels)
        whole = codes_of_all(codes)
        logits = similarities(whole, unit=config.unit_codes) / config.temperature
        term = contrastive_loss(logits, labels)
        terms["contrastive"] = term.detach()
        return loss + config.gamma * term


def codes_of_all(codes: SparseCodes) -> SparseCodes:
    """The codes of all ranks' rows; the gradient is that of this rank's."""
    if ROWS.size == 1:
        return codes
    entries = ROWS.gather(codes.row_ptr.diff())
    row_ptr = torch.zeros(len(entries) + 1, dtype=torch.int64, device=entries.device)
    torch.cumsum(entries, 0, out=row_ptr[1:])
    return SparseCodes(row_ptr, ROWS.gather(codes.index), ROWS.gather(codes.value), codes.d_sae)


def similarities(codes: SparseCodes, *, unit: bool) -> Tensor:
    """Inner products of all rows' codes [batch, batch], of unit length if asked.

    Costs batch^2 k multiplications.
    """
    value = codes.value
    if unit:
        rows = codes.rows()
        square = value.new_zeros(codes.batch).index_add(0, rows, value.square())
        # of a row without features nothing is to be divided, nor any gradient to be had
        scale = square.clamp_min(torch.finfo(value.dtype).tiny).rsqrt() * (square > 0)
        value = value * scale.index_select(0, rows)
    return _Gram.apply(value, replace(codes, value=value.detach()))  # type: ignore[return-value]


class _Gram(Function):
    """Z Z^T of sparse Z: (G + G^T) Z is the gradient, on Z's entries."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        blocks = [
            kernels.decode(codes.row_ptr, codes.index, value, some)
            for _, some in _transposed(codes)
        ]
        return torch.cat(blocks, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        codes: SparseCodes = ctx.codes
        both = gradients[0] + gradients[0].T
        d_value = torch.zeros_like(codes.value)
        for rows, some in _transposed(codes):
            d_value += kernels.encode_selected(
                both[:, rows].contiguous(), some, None, codes.row_ptr, codes.index
            )
        return d_value, None


def _transposed(codes: SparseCodes) -> Iterator[tuple[slice, Tensor]]:
    """Dense codes of a few rows at a time, transposed [d_sae, rows]."""
    size = max(1, _CHUNK_ELEMENTS // codes.d_sae)
    for start in range(0, codes.batch, size):
        rows = slice(start, min(start + size, codes.batch))
        low, high = codes.row_ptr[[rows.start, rows.stop]].tolist()
        row_ptr = codes.row_ptr[rows.start : rows.stop + 1] - low
        few = SparseCodes(row_ptr, codes.index[low:high], codes.value[low:high], codes.d_sae)
        dense = few.value.new_zeros(codes.d_sae, few.batch)
        yield rows, dense.index_put_((few.index, few.rows()), few.value)


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
