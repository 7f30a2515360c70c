"""What features cost by how often each fires (Rajamanoharan, McDougall and Smith 2025).

"Removing High Frequency Latents from JumpReLU SAEs", in the second progress update of Google
DeepMind's interpretability team. A penalty on L0 sees the mean of the features' frequencies alone:
some that fire on every tenth row or more cost no more than many rare ones. With f_i the fraction of
a batch's rows that feature i fires on, their penalty is

    sum_i f_i (1 + f_i / f_0) = L0 + sum_i f_i^2 / f_0

about linear in the frequency of a feature below f_0, about quadratic above.
"""

from torch import Tensor

from sae import kernels
from sae.distributed import FEATURES, ROWS


def squared_frequencies(active: Tensor, index: Tensor, d_sae: int, total: int) -> Tensor:
    """The sum of f_i^2 over all features, a scalar; as of all sums in a loss, the gradient is own.

    Args:
        active: [entries], 1 where an entry's feature fires and 0 where not, with the gradient of a
            straight-through estimator.
        index: int64 [entries], the feature of each entry, of this rank's.
        d_sae: features that this rank has.
        total: rows of the whole batch.

    >>> import torch
    >>> float(squared_frequencies(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2, 2, 0]), 3, 4))
    0.25
    """
    own = active.new_zeros(d_sae).index_add(0, index, active)
    frequency = ROWS.sum(own) / total
    return FEATURES.sum(kernels.total(frequency.square()))
