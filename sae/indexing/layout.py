"""A plane map of directions: t-SNE of their nearest neighbours, with the repulsion on a grid.

t-SNE (van der Maaten and Hinton 2008) puts points where neighbours attract and all repel each
other. Here the neighbours of a direction are the nearest ones by cosine, all with the same weight,
which serves as well as weights by distance (Böhm, Berens and Kobak 2022, arXiv 2007.08902). The
repulsion of all pairs is summed on a grid by Fourier transforms, as in FIt-SNE (Linderman et al.
2019, arXiv 1712.09005): an iteration costs O(n), and nothing of size [n, n] exists.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional

from saescope.progress import Progress

NEAREST = 15
"""neighbours of each direction, which attract it"""
_EARLY, _ITERATIONS = 100, 500
_EXAGGERATION = 12.0
"""factor of the attraction in the first iterations, in which the map's large parts form"""
_CELL, _MOST_CELLS = 0.5, 512
_FEW = 3
"""a map has to have over so many times as many points as neighbours of each"""
_BEGINNING = 1e-4
"""spread at the beginning, so that the first forces are those of points in one place"""
_SEED = 20260

Floats = NDArray[np.float64]


def lay_out(directions: Tensor, nearest: NDArray[np.integer]) -> NDArray[np.float32]:
    """Coordinates [n, 2] on a map where near directions are near; the same for the same input.

    Points start at the directions' two main components, and stay there where most directions are
    neighbours of one another, as nothing is left to attract or repel.

    Args:
        directions: [n, d].
        nearest: [n, k], each one's k nearest others.
    """
    y = _main_components(directions)
    if len(y) <= _FEW * nearest.shape[1] or not nearest.size:
        return y.astype(np.float32)
    y *= _BEGINNING / max(float(y[:, 0].std()), 1e-12)
    y += 1e-3 * _BEGINNING * np.random.default_rng(_SEED).normal(size=y.shape)
    head, tail, weight = _attraction(nearest)
    speed, gain = np.zeros_like(y), np.ones_like(y)
    rate = len(y) / _EXAGGERATION
    iterations = min(_ITERATIONS, 2 * _EARLY + len(y) // 4)  # few points settle sooner
    with Progress("map of directions", iterations, "iterations") as progress:
        for iteration in range(iterations):
            early = iteration < _EARLY
            difference = y[tail] - y[head]
            pull = weight / (1 + (difference**2).sum(1))
            attracted = _sums(head, pull[:, None] * difference, len(y))
            force = (_EXAGGERATION if early else 1.0) * attracted + _repulsion(y)
            # as van der Maaten and Hinton do: larger steps where the force goes on as it was
            along = np.sign(force) == np.sign(speed)
            gain = np.where(along, gain + 0.2, np.maximum(0.8 * gain, 0.01))
            speed = (0.5 if early else 0.8) * speed + 4 * rate * gain * force
            y += speed
            progress.advance()
    return (y - y.mean(0)).astype(np.float32)


def _main_components(directions: Tensor) -> Floats:
    """Directions of length one along their two main axes, [n, 2]; zeros where there is but one."""
    unit = functional.normalize(directions.float(), dim=1)
    unit = unit - unit.mean(0)
    _, vectors = torch.linalg.eigh((unit.T @ unit).double())
    main = vectors[:, -2:].flip(1)
    main = main * main.gather(0, main.abs().argmax(0, keepdim=True)).sign()  # else either sign
    y = np.zeros((len(unit), 2))
    y[:, : main.shape[1]] = (unit.double() @ main).numpy()
    return y


def _attraction(
    nearest: NDArray[np.integer],
) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats]:
    """Pairs of neighbours, both ways round, and their weights, which sum to one."""
    n, k = nearest.shape
    begins = np.arange(0, n * k + 1, k)
    graph = csr_array((np.ones(n * k), nearest.ravel(), begins), shape=(n, n))
    both = (graph + graph.T).tocoo()
    head, tail = both.coords
    return head, tail, both.data / both.data.sum()


def _sums(index: NDArray[np.integer], values: Floats, n: int) -> Floats:
    """Values [m, 2] summed by index [m]: [n, 2]."""
    sums = [np.bincount(index, values[:, axis], minlength=n) for axis in (0, 1)]
    return np.stack(sums, axis=1).astype(np.float64, copy=False)


def _repulsion(y: Floats) -> Floats:
    """The force [n, 2] on each point: of each other at distance r q^2 away from it, divided by the
    sum of q over all pairs; q = 1 / (1 + r^2).

    Points are spread over the 3 x 3 cells around them by quadratic splines, and so are the forces
    read; a cell is half as wide as q, or wider on a large map.
    """
    low = y.min(0)
    extent = float((y - low).max())
    width = max(_CELL, extent / _MOST_CELLS)
    side = int(extent / width) + 4
    at = (y - low) / width + 1
    cell = np.rint(at).astype(np.int64)
    off = at - cell
    spline = np.stack([(0.5 - off) ** 2 / 2, 0.75 - off**2, (0.5 + off) ** 2 / 2])
    corners = [(a, b) for a in range(3) for b in range(3)]
    cells = np.stack([(cell[:, 0] + a - 1) * side + cell[:, 1] + b - 1 for a, b in corners])
    share = np.stack([spline[a, :, 0] * spline[b, :, 1] for a, b in corners])
    # twice as long, so that nothing comes round; such lengths are quickly transformed
    size = -(-2 * side // 64) * 64
    step = width * np.minimum(np.arange(size), size - np.arange(size))
    q = 1 / (1 + step[:, None] ** 2 + step**2)

    def spread(charge: Floats) -> NDArray[np.complex128]:
        grid = np.bincount(cells.ravel(), (share * charge).ravel(), minlength=side * side)
        return np.fft.rfft2(grid.reshape(side, side), (size, size))

    def read(transformed: NDArray[np.complex128]) -> Floats:
        grid = np.fft.irfft2(transformed, (size, size))[:side, :side]
        return (share * grid.ravel()[cells]).sum(0)

    one, square = spread(np.ones(len(y))), np.fft.rfft2(q * q)
    row, column = np.array(corners).T
    on_itself = share * (q[abs(row[:, None] - row), abs(column[:, None] - column)] @ share)
    total = float(read(one * np.fft.rfft2(q)).sum() - on_itself.sum())
    centred = y - y.mean(0)
    pushed = [read(spread(centred[:, axis]) * square) for axis in (0, 1)]
    away = centred * read(one * square)[:, None] - np.stack(pushed, axis=1)
    return away / max(total, 1e-12)
