"""How much a feature steers the next token, by what one pass with the feature amplified gives.

With p the next-token probabilities of a neutral prompt whose last position has the feature
amplified, and R the feature's own tokens (those that its decoder direction raises most):

    output score        (1 - min_{r in R} rank_p(r) / V) * max_{r in R} p(r)
                        ranks from 0 of V tokens (Arad et al. 2025, arXiv 2505.20063, section 4)
    token confidence    C = -1/k sum over the k likeliest tokens of ln p
                        (Fu et al. 2025, arXiv 2508.15260); its change is C with the feature
                        amplified minus C without (the criterion of Wang et al. 2025,
                        arXiv 2510.03659)

A peaked distribution has a high C: all but its first tokens are improbable.
"""

from jaxtyping import Float, Int
from torch import Tensor

PROMPT = "From my experience,"
"""the neutral prompt of the code that goes with arXiv 2505.20063"""
AMPLIFIED = 10.0
"""in the same code: how many times the largest activation of any feature at the prompt's last token
is added"""
OWN_TOKENS = 20
CONFIDENCE_TOKENS = 20


def output_score(
    logits: Float[Tensor, "n d_vocab"], own: Int[Tensor, "n r"]
) -> Float[Tensor, " n"]:
    """The output score of features, from the logits of the amplified pass and their own tokens.

    A token that is as likely as others ranks behind none of them.

    >>> import torch
    >>> p = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    >>> output_score(p.log(), torch.tensor([[1, 3]])).tolist()  # ranks 1 and 2: (1 - 1/4) * 0.25
    [0.1875]
    """
    best = logits.gather(1, own).amax(1, keepdim=True)  # the likeliest is also the first in rank
    rank = (logits > best).sum(1)
    probability = logits.float().softmax(1).gather(1, own).amax(1)
    return (1 - rank / logits.shape[1]) * probability


def token_confidence(
    logits: Float[Tensor, "n d_vocab"], k: int = CONFIDENCE_TOKENS
) -> Float[Tensor, " n"]:
    """Token confidence of next-token distributions, in nats.

    >>> import torch
    >>> p = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    >>> round(float(token_confidence(p.log(), 2)), 4)  # (ln 2 + ln 4) / 2
    1.0397
    """
    return -logits.float().log_softmax(1).topk(min(k, logits.shape[1]), dim=1).values.mean(1)
