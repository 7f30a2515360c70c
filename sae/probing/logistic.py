"""Logistic regression with an L2 penalty whose strength is chosen by cross-validation.

    minimise over w, b:  1/2 ||w||^2 + C sum_i log(1 + exp(-s_i (w x_i + b))),   s_i = -1 or 1

the objective of scikit-learn's LogisticRegression, on columns standardised by the rows fitted on.
It is convex and solved to its minimum by Newton's method: nothing hangs on epochs, learning rates
or starting points, and no epoch can be chosen on test data.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saescope.errors import InputError

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""values of C that are tried, rising"""
FOLDS = 5
_STEPS = 100
_ENOUGH = 1e-11
"""Newton's method ends when a step would lower the loss by less than this part of it"""
_FEW_COLUMNS = 64
"""with more the columns are rotated to principal axes, and Newton's steps found by iteration"""
_WORSE_IN_A_ROW = 2
"""so often may the held-out loss be above its least before larger C are given up"""

Matrix = NDArray[np.float64]
Labels = NDArray[np.bool_]


class Probe(NamedTuple):
    """A fitted probe: a row x scores w . (x - mean) / scale + b; above 0 it is called positive."""

    mean: Matrix
    """[columns]"""
    scale: Matrix
    """[columns], 1 where a column does not vary"""
    weight: Matrix
    """[columns]"""
    bias: float
    strength: float
    """the C chosen"""

    def score(self, x: Matrix) -> Matrix:
        """Log-odds of the label for rows x [rows, columns]: [rows]."""
        return ((x - self.mean) / self.scale) @ self.weight + self.bias


class PreparedRows:
    """Rows that probes are fitted on: standardised, and rotated where there are many columns."""

    def __init__(self, x: Matrix) -> None:
        self.mean, scale = x.mean(0), x.std(0)
        self.scale = np.where(scale > 1e-12 * np.abs(x).max(0, initial=0.0), scale, 1.0)
        self._rows = (x - self.mean) / self.scale
        self._basis: Matrix | None = None
        if x.shape[1] > _FEW_COLUMNS:  # the minimum is in the span of the rows
            self._basis = np.linalg.svd(self._rows, full_matrices=False)[2]
            self._rows = self._rows @ self._basis.T

    def fit(self, y: Labels, *, seed: int, strength: float | None = None) -> Probe:
        """`fit` of these rows."""
        if y.all() or not y.any():
            raise InputError("all labels are equal", where="probe", given=f"{len(y)} labels")
        if strength is None:
            weight, bias, strength = _chosen(self._rows, y, folds_of(y, seed))
        else:
            theta = minimise(self._rows, y, np.ones((1, len(y))), strength)[0]
            weight, bias = theta[:-1], float(theta[-1])
        weight = weight if self._basis is None else weight @ self._basis
        return Probe(self.mean, self.scale, weight, bias, strength)


def fit(x: Matrix, y: Labels, *, seed: int, strength: float | None = None) -> Probe:
    """The probe of labels y [rows] on x [rows, columns], C chosen among `STRENGTHS` if not given.

    C has the least mean log loss on folds left out, stratified and drawn by `seed`; of equal ones
    the smallest. With fewer than two rows of a label there is nothing to leave out, and C is 1.
    Raises InputError if all labels are equal.
    """
    return PreparedRows(x).fit(y, seed=seed, strength=strength)


def folds_of(y: Labels, seed: int) -> NDArray[np.int64]:
    """The fold of each row [rows]: rows of a label are dealt out in an order drawn by `seed`.

    There are `FOLDS`, or as many as the rarer label has rows.

    >>> folds_of(np.array([True, False, True, False, False]), seed=0).max()
    np.int64(1)
    """
    count = min(FOLDS, int(y.sum()), int((~y).sum()))
    draw = np.random.default_rng(seed)
    fold = np.zeros(len(y), np.int64)
    for label in (True, False):
        rows = np.flatnonzero(y == label)
        fold[draw.permutation(rows)] = np.arange(len(rows)) % count
    return fold


def _chosen(x: Matrix, y: Labels, fold: NDArray[np.int64]) -> tuple[Matrix, float, float]:
    """Weight, bias and C of the fit to all rows at the C that does best on folds left out."""
    count = int(fold.max()) + 1
    if count < 2:
        theta = minimise(x, y, np.ones((1, len(y))), 1.0)
        return theta[0, :-1], float(theta[0, -1]), 1.0
    # the first problem is of all rows, each other one of those outside a fold
    rows = np.vstack([np.ones(len(y)), fold != np.arange(count)[:, None]]).astype(np.float64)
    signs = np.where(y, 1.0, -1.0)
    theta: Matrix | None = None
    best: tuple[float, Matrix, float] | None = None
    worse = 0
    for strength in STRENGTHS:
        theta = minimise(x, y, rows, strength, theta)
        scores = theta[1:, :-1] @ x.T + theta[1:, -1:]
        loss = float((np.logaddexp(0.0, -signs * scores) * (1 - rows[1:])).sum() / len(y))
        if best is None or loss < best[0]:
            best, worse = (loss, theta[0], strength), 0
        else:
            worse += 1
            if worse == _WORSE_IN_A_ROW:
                break
    assert best is not None
    return best[1][:-1], float(best[1][-1]), best[2]


def minimise(
    x: Matrix, y: Labels, rows: Matrix, strength: float, start: Matrix | None = None
) -> Matrix:
    """The minima [problems, columns + 1] (weight, then bias) of several fits to some rows of x.

    Args: rows [problems, rows] weighs the rows in each fit, 1 or 0; start is where to begin.
    """
    a = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    penalty = np.append(np.ones(x.shape[1]), 0.0)
    signs = np.where(y, 1.0, -1.0)
    theta = np.zeros((len(rows), a.shape[1])) if start is None else start.copy()

    def losses(theta: Matrix) -> Matrix:
        wrong = np.logaddexp(0.0, -signs * (theta @ a.T))
        return 0.5 * (theta**2 @ penalty) + strength * (rows * wrong).sum(1)

    loss = losses(theta)
    for _ in range(_STEPS):
        odds = 0.5 * (1 + np.tanh(0.5 * (theta @ a.T)))
        gradient = penalty * theta + strength * (rows * (odds - y)) @ a
        step = _newton_step(a, penalty, strength * rows * odds * (1 - odds), gradient)
        decrease = (gradient * step).sum(1)
        if (decrease <= _ENOUGH * (1 + loss)).all():
            break
        size = np.ones(len(rows))
        while True:
            moved = losses(theta - size[:, None] * step)
            short = (moved > loss - 1e-4 * size * decrease) & (size > 1e-8)
            short &= decrease > _ENOUGH * (1 + loss)
            if not short.any():
                break
            size[short] /= 2
        theta, loss = theta - size[:, None] * step, moved
    return theta


def _newton_step(a: Matrix, penalty: Matrix, curve: Matrix, gradient: Matrix) -> Matrix:
    """Solutions [problems, columns] of (diag(penalty) + a' diag(curve) a) step = gradient."""
    # the bias has no penalty: where all rows are far from the boundary nothing else holds it
    ridge = penalty + 1e-10
    if a.shape[1] <= _FEW_COLUMNS:
        hessian = np.stack([(a * each[:, None]).T @ a for each in curve])
        hessian[:, range(len(ridge)), range(len(ridge))] += ridge
        return np.linalg.solve(hessian, gradient[..., None])[..., 0].astype(np.float64)
    diagonal = ridge + curve @ a**2
    step, residual = np.zeros_like(gradient), gradient.copy()
    towards = residual / diagonal
    size = (residual * towards).sum(1)
    enough = 1e-6 * size
    for _ in range(_STEPS):  # conjugate gradients
        if (size <= enough).all():
            break
        image = ridge * towards + (curve * (towards @ a.T)) @ a
        along = (towards * image).sum(1)
        length = np.where(along > 0, size / np.where(along > 0, along, 1.0), 0.0)[:, None]
        step += length * towards
        residual -= length * image
        scaled = residual / diagonal
        before, size = size, (residual * scaled).sum(1)
        towards = scaled + (size / np.where(before > 0, before, 1.0))[:, None] * towards
    return step
