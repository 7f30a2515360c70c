"""Shapes, tensors and comparisons for the tests of the C++ backend."""

import torch
from torch import Tensor

# batch, d, d_sae, k: vectors of 16, slices of 64, tiles of 4096 sources, and what does not fit them
SHAPES = [
    (1, 1, 1, 1), (3, 5, 7, 2), (2, 15, 16, 16), (17, 33, 65, 9), (8, 16, 64, 5),
    (64, 24, 100, 100), (40, 8, 300, 1), (5, 63, 513, 3), (9, 64, 512, 64), (6, 65, 1000, 250),
    (33, 129, 2050, 7), (4, 130, 4097, 20), (4100, 3, 11, 4), (30, 70, 8200, 33),
]  # fmt: skip


class Random:
    """Reproducible tensors."""

    def __init__(self, seed: object) -> None:
        self.generator = torch.Generator().manual_seed(hash(seed) % 2**32)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator)

    def integers(self, *size: int, most: int = 3) -> Tensor:
        """Small integers: sums of their products are exact, and full of ties."""
        return torch.randint(-most, most + 1, size, generator=self.generator).float()

    def codes(self, batch: int, d_sae: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """About k entries a row, in no order; every fifth row is empty."""
        mask = torch.rand(batch, d_sae, generator=self.generator) < k / d_sae
        mask[::5] = False
        row_ptr = torch.zeros(batch + 1, dtype=torch.int64)
        torch.cumsum(mask.sum(1), 0, out=row_ptr[1:])
        index = mask.nonzero()[:, 1]
        for start, end in zip(row_ptr.tolist(), row_ptr.tolist()[1:], strict=False):
            order = torch.randperm(end - start, generator=self.generator)
            index[start:end] = index[start:end][order]
        return row_ptr, index, self.normal(len(index))


def double(*tensors: Tensor) -> list[Tensor]:
    return [each.double() if each.is_floating_point() else each for each in tensors]


def assert_as_good(found: Tensor, torchs: Tensor, exact: Tensor, roundings: int = 4) -> None:
    """The error is at most twice that of torch's float32 operators (or a few roundings)."""
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    if not exact.numel():
        return
    floor = roundings * torch.finfo(torch.float32).eps * exact.abs().max()
    error, allowed = (found - exact).abs().max(), 2 * (torchs - exact).abs().max()
    assert error <= max(float(allowed), float(floor))


def chosen(pre: Tensor, k: int, signed: bool) -> Tensor:
    """The k first columns of each row, by value and then by index; in rising order."""
    ranked = pre.abs() if signed else pre
    return ranked.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
