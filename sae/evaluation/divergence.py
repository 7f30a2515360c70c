"""KL divergence of next-token distributions, in nats: sum_v p_v (log p_v - log q_v)."""

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
