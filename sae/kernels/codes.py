"""Sparse feature activations: which features fire on each row, and how strongly."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from saescope.errors import InputError


@dataclass(frozen=True)
class SparseCodes:
    """Codes of a batch in CSR form, for architectures with a fixed or a varying number of features.

    Row r holds entries row_ptr[r] to row_ptr[r+1]. A stored value may be 0 (TopK with fewer than k
    positive pre-activations); `compact` drops those.

    >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> codes.index.tolist(), codes.value.tolist(), codes.l0().tolist()
    ([1, 0, 2], [2.0, 1.0, 3.0], [1, 2])
    """

    row_ptr: Tensor
    """int64 [batch + 1]"""
    index: Tensor
    """int64 [entries], feature of each entry"""
    value: Tensor
    """[entries], activation of each entry"""
    d_sae: int
    """width of the dictionary"""

    @classmethod
    def from_fixed(cls, index: Tensor, value: Tensor, d_sae: int) -> Self:
        """From index and value of shape [batch, k]."""
        batch, k = index.shape
        row_ptr = (
            torch.arange(0, batch * k + 1, k, device=index.device)
            if k
            else (torch.zeros(batch + 1, dtype=torch.int64, device=index.device))
        )
        # contiguous: a slice of one column is a strided view even when flattened
        return cls(row_ptr, index.reshape(-1).contiguous(), value.reshape(-1).contiguous(), d_sae)

    @classmethod
    def from_dense(cls, dense: Tensor) -> Self:
        """From dense activations [batch, d_sae]; zeros are not stored."""
        active = dense != 0
        row_ptr = torch.zeros(len(dense) + 1, dtype=torch.int64, device=dense.device)
        torch.cumsum(active.sum(1), 0, out=row_ptr[1:])
        index = active.nonzero()[:, 1]
        return cls(row_ptr, index, dense[active], dense.shape[1])

    @classmethod
    def from_flat(cls, flat: Tensor, value: Tensor, batch: int, d_sae: int) -> Self:
        """From entries at row * d_sae + feature, int64 [entries], none twice, in any order."""
        flat, order = flat.sort()
        row_ptr = torch.zeros(batch + 1, dtype=torch.int64, device=flat.device)
        torch.cumsum(torch.bincount(flat // d_sae, minlength=batch), 0, out=row_ptr[1:])
        return cls(row_ptr, flat % d_sae, value[order], d_sae)

    @classmethod
    def none(cls, like: Tensor, d_sae: int) -> Self:
        """No entry at all, for as many rows as `like` [batch, ...] has, with values of its kind."""
        row_ptr = torch.zeros(len(like) + 1, dtype=torch.int64, device=like.device)
        return cls(row_ptr, row_ptr[:0], like.new_zeros(0), d_sae)

    @classmethod
    def concatenate(cls, several: list[Self]) -> Self:
        """Codes of consecutive chunks of one batch, as one."""
        if not several:
            raise InputError("no codes to join", where="SparseCodes.concatenate", given=[])
        counts = torch.cat([each.row_ptr.diff() for each in several])
        row_ptr = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=row_ptr[1:])
        return cls(
            row_ptr,
            torch.cat([each.index for each in several]),
            torch.cat([each.value for each in several]),
            several[0].d_sae,
        )

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.row_ptr) - 1

    def rows(self) -> Tensor:
        """Row of each entry, int64 [entries]."""
        counts = self.row_ptr.diff()
        return torch.repeat_interleave(torch.arange(self.batch, device=counts.device), counts)

    def flat(self) -> Tensor:
        """row * d_sae + feature of each entry, int64 [entries]."""
        return self.rows() * self.d_sae + self.index

    def select(self, mask: Tensor) -> "SparseCodes":
        """The entries for which mask bool [entries] is true."""
        before = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(mask, 0, out=before[1:])
        kept = mask.nonzero()[:, 0]
        index, value = self.index.index_select(0, kept), self.value.index_select(0, kept)
        return SparseCodes(before[self.row_ptr], index, value, self.d_sae)

    def l0(self) -> Tensor:
        """Number of non-zero activations of each row, int64 [batch]."""
        active = (self.value != 0).to(torch.int64)
        return torch.zeros_like(self.row_ptr[1:]).index_add_(0, self.rows(), active)

    def counts(self) -> Tensor:
        """Number of rows each feature is non-zero on, int64 [d_sae]."""
        return torch.bincount(self.index[self.value != 0], minlength=self.d_sae)

    def compact(self) -> "SparseCodes":
        """The same codes without stored zeros."""
        return self.select(self.value != 0)

    def scale(self, factor: Tensor | float) -> "SparseCodes":
        """The same codes, every activation multiplied by a factor, or by its row's [batch, 1]."""
        if isinstance(factor, Tensor) and factor.ndim:
            factor = factor.reshape(-1)[self.rows()]
        return SparseCodes(self.row_ptr, self.index, self.value * factor, self.d_sae)

    def dense(self) -> Tensor:
        """Dense activations [batch, d_sae]."""
        out = self.value.new_zeros(self.batch, self.d_sae)
        return out.index_put((self.rows(), self.index), self.value, accumulate=True)

    def of(self, features: Tensor) -> "SparseCodes":
        """The codes of a few distinct features, which are numbered in the order given."""
        column_of = torch.full((self.d_sae,), -1, dtype=torch.int64, device=self.index.device)
        column_of[features] = torch.arange(len(features), device=self.index.device)
        column = column_of[self.index]
        found = self.select(column >= 0)
        return SparseCodes(found.row_ptr, column_of[found.index], found.value, len(features))

    def columns(self, features: Tensor) -> Tensor:
        """Dense activations of a few distinct features [batch, features], in the order given."""
        return self.of(features).dense()


def csr_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where mask bool [batch, d_sae] is true: (row_ptr int64 [batch + 1], index int64 [entries]).

    >>> csr_of(torch.tensor([[True, False], [True, True]]))
    (tensor([0, 1, 3]), tensor([0, 0, 1]))
    """
    row_ptr = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(mask.sum(1), 0, out=row_ptr[1:])
    flat = mask.reshape(-1).nonzero()[:, 0]
    return row_ptr, flat.remainder_(mask.shape[1])
