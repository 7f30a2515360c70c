"""Loss terms and fits that several architectures are composed of."""

import torch
from torch import Tensor
from torch.nn import functional

from sae import kernels


def auxk(
    residual: Tensor,
    centred: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    k_aux: int,
) -> Tensor:
    """AuxK: let the k_aux strongest dead features reconstruct what the living ones left over.

    ||e - e_hat||^2 / ||e - mean e||^2 over the batch, with e = y - y_hat detached and e_hat
    without bias (Gao et al. 2024, appendix A.2); 0 where there is no dead feature or nothing left.

    Args: residual, centred (y - b_dec) [batch, d_in]; dead bool [d_sae].
    """
    rows = dead.nonzero()[:, 0]
    if len(rows) == 0 or k_aux == 0:
        return residual.new_zeros(())
    target = residual.detach()
    encoder, bias = W_enc_T.index_select(0, rows), b_enc.index_select(0, rows)
    decoder = W_dec.index_select(0, rows)
    if len(rows) <= k_aux:  # all of them are taken, and dense products on so few rows are cheap
        e_hat = torch.relu(functional.linear(centred, encoder, bias)) @ decoder
    else:
        index, value = kernels.encode_topk(centred, encoder, bias, k_aux)
        row_ptr = torch.arange(0, len(residual) * k_aux + 1, k_aux, device=residual.device)
        e_hat = kernels.decode(row_ptr, index.reshape(-1), value.reshape(-1), decoder)
    return unpredicted(target, e_hat)


def unpredicted(residual: Tensor, e_hat: Tensor) -> Tensor:
    """||e - e_hat||^2 / ||e - mean e||^2 over a batch [batch, d_out]; 0 where e does not vary."""
    left = (residual - e_hat).square().sum()
    total = (residual - residual.mean(0)).square().sum()
    return left / torch.where(total > 0, total, torch.inf)  # so that gradients are 0 there too


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point [d_in] of least summed distance to points [rows, d_in] (Weiszfeld's iteration)."""
    guess = points.mean(0)
    for _ in range(iterations):
        weight = 1 / (points - guess).norm(dim=1, keepdim=True).clamp_min(1e-12)
        moved = (points * weight).sum(0) / weight.sum()
        if (moved - guess).norm() <= tolerance * guess.norm():
            return moved
        guess = moved
    return guess
