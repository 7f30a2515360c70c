"""KL divergence of next-token distributions, in nats: sum_v p_v (log p_v - log q_v)."""

from typing import Any

import torch
from torch import Tensor


def divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The terms of KL(p || q), of which the sum over the vocabulary is to be taken; differentiable.

    Args: log-probabilities [..., vocabulary].

    >>> import math, torch
    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(float(divergence_terms(p.log(), q.log()).sum()), 4)
    0.1438
    """
    return log_p.exp() * (log_p - log_q)


def divergence_in_place(clean: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(other)) of logits [..., vocabulary], which are overwritten.

    Logits are the largest thing in memory: here is no third copy of them, and no gradient.
    """
    log_p = clean.sub_(clean.logsumexp(-1, keepdim=True))
    log_q = other.sub_(other.logsumexp(-1, keepdim=True))
    log_q.neg_().add_(log_p)
    return log_q.mul_(log_p.exp_()).sum(-1)


class DivergenceOfLogits(torch.autograd.Function):
    """KL(softmax(clean) || softmax(other)) of logits [rows, vocabulary]: [rows].

    Differentiable in `other`, by q - p, which is all that is kept: written with log_softmax,
    autograd keeps and goes through four tensors of this size.

    >>> from torch import tensor
    >>> other = tensor([[0.0, 0.0]], requires_grad=True)
    >>> DivergenceOfLogits.apply(tensor([[0.0, 100.0]]), other).sum().backward()
    >>> other.grad.tolist()
    [[0.5, -0.5]]
    """

    @staticmethod
    def forward(ctx: Any, clean: Tensor, other: Tensor) -> Tensor:
        precision = torch.promote_types(other.dtype, torch.float32)
        ratio = clean.to(precision).log_softmax(-1)
        log_q = other.to(precision).log_softmax(-1)
        p = ratio.exp()
        ratio -= log_q
        ctx.save_for_backward(log_q.exp_().sub_(p))
        return torch.linalg.vecdot(p, ratio)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream[0][:, None]
