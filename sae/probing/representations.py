"""What is probed: an SAE's features of texts, and the baselines beside them, as columns a text."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.core.batch import TrainingBatch
from sae.kernels.codes import SparseCodes
from sae.probing.logistic import Matrix
from sae.probing.text_rows import TextRows

Method = Literal["sae", "untrained", "random", "pca", "neurons", "raw"]
METHODS: dict[Method, str] = {
    "sae": "the SAE's features, the k of largest SMD",
    "untrained": "the same of an SAE of this architecture and shape that was never trained",
    "random": "k of the SAE's features that fire on training texts, drawn at random",
    "pca": "principal components of the training texts' activations, the k of largest SMD",
    "neurons": "coordinates of the activations, the k of largest SMD",
    "raw": "all coordinates of the activations",
}
COMPONENTS = 64
"""principal components that are chosen among"""
_ROWS = 4096
"""rows encoded at a time"""

Encode = Callable[[Tensor], SparseCodes]


@torch.no_grad()
def features_of(encode: Encode, rows: TextRows, texts: int) -> sparse.csr_array:
    """Features [texts, d_sae] of each text: of its row, or averaged over its rows.

    The average is over kept positions, those where a feature is silent counted as 0.
    """
    pieces = []
    for start in range(0, len(rows.x), _ROWS):
        codes = encode(rows.x[start : start + _ROWS].float()).compact()
        values = codes.value.double().cpu().numpy()
        index, pointer = codes.index.cpu().numpy(), codes.row_ptr.cpu().numpy()
        shape = (codes.batch, codes.d_sae)
        pieces.append(sparse.csr_array((values, index, pointer), shape=shape))
    return sparse.csr_array(_averaging(rows, texts) @ sparse.vstack(pieces, format="csr"))


def activations_of(rows: TextRows, texts: int) -> Matrix:
    """Activations [texts, d_in] of each text: its row, or the mean of its rows."""
    return _averaging(rows, texts) @ rows.x.double().numpy()


def _averaging(rows: TextRows, texts: int) -> sparse.csr_array:
    """What averages rows [rows, ...] to texts: [texts, rows]; nothing for texts without rows."""
    count = np.bincount(rows.text, minlength=texts)
    weight = 1.0 / count[rows.text]
    entries = (rows.text, np.arange(len(rows.text)))
    return sparse.csr_array((weight, entries), shape=(texts, len(rows.text)))


def principal_components(x: Matrix, train: NDArray[np.int64]) -> Matrix:
    """The first `COMPONENTS` principal components [rows, components] of x, those of its training
    rows; of fewer rows or columns as many as there are."""
    mean = x[train].mean(0)
    axes = np.linalg.svd(x[train] - mean, full_matrices=False)[2]
    most = min(COMPONENTS, len(train) - 1, x.shape[1])
    return (x - mean) @ axes[:most].T


@torch.no_grad()
def untrained(sae: SparseAutoencoder, x: Tensor, seed: int) -> SparseAutoencoder:
    """An SAE as training of one like this would begin: random weights, drawn by `seed`.

    Args: x [rows, d_in] are activations, which set what training sets before its first step (the
    bias of the decoder), and the thresholds of inference, so that the L0 is the one asked for.
    """
    fresh = sae.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh.reset_parameters()
        y = fresh.normaliser.apply(x)
        # what a transcoder is to write does not touch its features
        target = y if fresh.d_in == fresh.d_out else y.new_zeros(len(y), fresh.d_out)
        fresh.start(TrainingBatch(y=y, target=target, variance=float(y.var(0).sum())))
    fresh.eval().calibrate(lambda: [y])
    return fresh
