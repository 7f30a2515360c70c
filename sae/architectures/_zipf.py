"""The Zipf law of how often features fire: density ~ 1 / (rank + beta)^alpha."""

import math

import torch
from torch import Tensor

from saescope.errors import InputError


def fit_zipf(densities: Tensor) -> tuple[float, float]:
    """(alpha, beta) of the Zipf-Mandelbrot law density ~ 1 / (rank + beta)^alpha.

    Least squares in log density over densities [n], in any order, each weighted by itself: to
    second order that minimises the divergence of the law from how activations are shared out, and a
    tail of features that hardly fire does not bend it. alpha >= 0, and beta from 0 to 10 n. For a
    given beta it is a straight line; beta is found by search. Raises InputError if none is
    positive.

    >>> alpha, beta = fit_zipf(1 / (torch.arange(1, 101) + 4.0) ** 1.5)
    >>> round(alpha, 3), round(beta, 3)
    (1.5, 4.0)
    """
    density = densities.to(torch.float64).reshape(-1)
    density = density[density > 0].sort(descending=True).values
    n = len(density)
    if n == 0:
        raise InputError("no feature fires", where="fit_zipf", given=0)
    weight = (density / density.sum())[:, None]
    wanted = density.log()[:, None]
    wanted = wanted - (weight * wanted).sum(0)
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=density.device)[:, None]

    def lines(betas: Tensor) -> tuple[Tensor, Tensor]:
        x = (ranks + betas).log()
        x -= (weight * x).sum(0)
        slope = (weight * x * wanted).sum(0) / (weight * x.square()).sum(0).clamp_min(1e-300)
        return slope, (weight * (wanted - slope * x).square()).sum(0)

    low, high = math.log(1e-3), math.log(10.0 * n)
    grid, best = ranks.new_zeros(1), 0
    for _ in range(9):  # each round is 8 times finer
        grid = torch.linspace(low, high, 17, dtype=torch.float64, device=ranks.device)
        best = int(lines(grid.exp())[1].argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 16)])
    betas = torch.stack([torch.zeros_like(grid[best]), grid[best].exp()])
    slope, error = lines(betas)
    chosen = int(error.argmin())
    return max(0.0, -float(slope[chosen])), float(betas[chosen])


def zipf_densities(densities: Tensor) -> Tensor:
    """What the law fitted to densities [n] gives each of them by its rank, float32 [n].

    Uniform 1 / n if none is positive.
    """
    n = len(densities)
    exact = densities.to(torch.float64)
    if not exact.any():
        return torch.full((n,), 1 / n, device=densities.device)
    alpha, beta = fit_zipf(exact)
    order = exact.argsort(descending=True, stable=True)
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=densities.device)
    log_law = -alpha * (ranks + beta).log()
    ranked = exact[order]
    misfit = torch.where(ranked > 0, ranked * (ranked.log() - log_law), 0.0)
    law = torch.empty_like(ranks)
    law[order] = (log_law + misfit.sum() / ranked.sum()).exp()
    return law.float()
