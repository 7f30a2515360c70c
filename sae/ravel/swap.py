"""Features taken from one activation and put into another, and which features to take.

With f and g the features of a base and a source activation, and f' = f but for the features of a
mask, where it is g, the base x becomes

    x + decode(f') - decode(f)        what the SAE does not explain is kept (the default)
    decode(f')                        or left out, as in SAEBench

With m the margin of an answer, the logit of the base's less that of the source's, feature i takes
it away by the share, to first order,

    e_i = -E[(dm/dx . W_dec,i) (g_i - f_i)] / E[m]

The features of an attribute A are those of largest e_i(A) - mean of e_i(B) over the other
attributes B: the sum over a mask is what the mask does to A less what it does to the others.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.probing.logistic import Matrix
from sae.ravel.questions import Indices


@torch.no_grad()
def with_features_of(
    sae: SparseAutoencoder, x: Tensor, source: Tensor, features: Indices | None, *, error: bool
) -> Tensor:
    """x [rows, d_in] with some features, or all, as in the rows of source [rows, d_in].

    Args: error keeps what the SAE does not explain of x.
    """
    own, other = sae.encode_sparse(x).dense(), sae.encode_sparse(source).dense()
    if features is None:
        edited = other
    else:
        which = torch.from_numpy(features).to(own.device)
        edited = own.index_copy(1, which, other[:, which])
    changed = sae.decode(edited, like=x)
    return x + (changed - sae.decode(own, like=x)) if error else changed


@torch.no_grad()
def effects(
    sae: SparseAutoencoder, x: Tensor, source: Tensor, margin: Tensor, gradient: Tensor
) -> Matrix:
    """e_i of each feature [d_sae], as above.

    Args: x and source [pairs, d_in]; margin [pairs] and gradient [pairs, d_in] are those of
    `Answers.margins`.
    """
    decoder = sae.decoder_directions().double()
    found = torch.zeros(sae.d_sae, dtype=torch.float64)
    for rows, sign in ((source, -1.0), (x, 1.0)):
        codes = sae.encode_sparse(rows).compact()
        along = (gradient[codes.rows().cpu()].double() * decoder[codes.index].cpu()).sum(1)
        found.index_add_(0, codes.index.cpu(), sign * along * codes.value.double().cpu())
    return (found / margin.double().sum()).numpy()


def ranked(of: Mapping[str, Matrix], attribute: str) -> Indices:
    """The features of an attribute, best first, from effects by attribute; none that do harm."""
    others = np.mean([each for name, each in of.items() if name != attribute], axis=0)
    score = of[attribute] - others
    order = np.argsort(-score, kind="stable")
    return order[score[order] > 0]
