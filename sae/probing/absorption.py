"""Absorption and splitting: latents that are silent where their concept is, as others stand in.

A concept is a label of rows and a direction p, along which a probe of the activations tells it.
Its main latents are those that a k-sparse probe needs: by rising k, until one more latent raises
F1 by no more than `F1_JUMP`. Where there are several the concept is split. On a row x that has the
concept, with unit p,

    A = x . p                             what there is of the concept
    c_i = f_i (W_dec,i . p)               what latent i writes of it
    m = the sum of c_i over main latents
    a = the sum of the `MOST_ABSORBERS` largest c_i > 0 of other latents with cos(W_dec,i, p) of
        `FRACTION_COSINE` or more

The absorption fraction is 0 if m >= A or a < `PROPORTION` A, 1 if m <= 0 otherwise, and between
them min(a, A - m) / (min(a, A - m) + m). A row is fully absorbed if every main latent is silent and
the latent of largest c_i has a cosine of `FULL_COSINE` or more and c_i >= `PROPORTION` A. A row
with A <= 0 has neither.

The definitions are those of Chanin et al. 2024 (arXiv 2409.14507, section 4: full absorption) and
of SAEBench (Karvonen et al. 2025, arXiv 2503.09532: the fraction). They write f_i cos(W_dec,i, p),
which is c_i where decoder rows have length 1; here they may have any. Their k-sparse probe chooses
latents by weights of an L1 probe and its F1 is of the test rows; here latents are chosen by their
standardised mean difference, and k by F1 on training rows left out, so that test rows decide
nothing.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from sae.probing.logistic import Labels, Matrix, fit, folds_of
from sae.probing.scores import best_cut, f1
from sae.probing.selection import columns, standardised_mean_difference
from saescope.errors import InputError

F1_JUMP = 0.03
"""what a further main latent has to add to F1"""
MOST_MAIN = 10
"""the largest k that is tried"""
FRACTION_COSINE = 0.1
"""of a latent that may absorb, for the absorption fraction"""
FULL_COSINE = 0.025
"""of the latent that absorbs a row fully"""
PROPORTION = 0.4
"""of A that latents must write to have absorbed"""
MOST_ABSORBERS = 3
"""latents that the absorption fraction counts on a row"""
STRENGTH = 1.0
"""C of the probes that k is chosen by"""
SILENT = 1e-8
"""activations that are smaller count as none"""


class MainLatents(NamedTuple):
    """The latents that stand for a concept."""

    latents: NDArray[np.int64]
    """the most telling first; none if no latent fires more where the concept is"""
    f1: float
    """of a probe on them, on training rows left out; 0 if there are none"""


class Absorption(NamedTuple):
    """What became of a concept on rows that have it."""

    fraction: Matrix
    """[rows], the absorption fraction, from 0 to 1"""
    full: Labels
    """[rows], whether the row is fully absorbed"""


def main_latents(codes: sparse.csr_array, y: Labels, *, seed: int) -> MainLatents:
    """The main latents of a label y [rows], from training codes [rows, d_sae].

    Candidates are the `MOST_MAIN` latents of largest positive standardised mean difference. Raises
    InputError if fewer than two rows have the label, or lack it.
    """
    if min(int(y.sum()), int((~y).sum())) < 2:
        raise InputError(
            "needs two rows with the label and two without",
            where="main_latents",
            given=f"{int(y.sum())} of {len(y)} with it",
        )
    difference = standardised_mean_difference(codes, y)
    order = np.argsort(-difference, kind="stable")[:MOST_MAIN]
    order = order[difference[order] > 0]
    x = columns(codes, order)
    best, count = 0.0, 0
    for k in range(1, len(order) + 1):
        found = f1(_scores_left_out(x[:, :k], y, seed), y)
        if k > 1 and found <= best + F1_JUMP:
            break
        best, count = found, k
    return MainLatents(order[:count], best)


def _scores_left_out(x: Matrix, y: Labels, seed: int) -> Matrix:
    """The score of each row [rows] by a probe fitted without the row's fold, above the cut of
    largest F1 on the rows it was fitted on."""
    fold = folds_of(y, seed)
    scores = np.zeros(len(y))
    for each in range(int(fold.max()) + 1):
        out = fold == each
        probe = fit(x[~out], y[~out], seed=seed, strength=STRENGTH)
        scores[out] = probe.score(x[out]) - best_cut(probe.score(x[~out]), y[~out])
    return scores


def absorption(
    x: Matrix,
    codes: sparse.csr_array,
    decoder: Matrix,
    direction: Matrix,
    main: NDArray[np.int64],
) -> Absorption:
    """Absorption fraction and full absorption of rows that have a concept.

    Args: x [rows, d_in] with codes [rows, d_sae]; decoder [d_sae, d_in], rows of any length;
    direction [d_in] of any length, pointing to the concept; main are the latents that stand for it.

    Raises InputError if shapes do not fit, or for a direction of length 0.
    """
    _check(x, codes, decoder, direction)
    unit = direction / np.linalg.norm(direction)
    written = decoder @ unit
    length = np.linalg.norm(decoder, axis=1)
    cosine = written / np.where(length > 0, length, 1.0)
    is_main = np.zeros(len(decoder), np.bool_)
    is_main[main] = True

    there = x @ unit
    fraction, full = np.zeros(len(x)), np.zeros(len(x), np.bool_)
    for row in np.flatnonzero(there > 0):
        entries = slice(codes.indptr[row], codes.indptr[row + 1])
        latent, value = codes.indices[entries], codes.data[entries]
        fires = np.abs(value) >= SILENT
        latent, value = latent[fires], value[fires]
        if not len(latent):
            continue
        of_main, part = is_main[latent], value * written[latent]
        others = part[~of_main & (cosine[latent] >= FRACTION_COSINE) & (part > 0)]
        absorbed = float(np.sort(others)[-MOST_ABSORBERS:].sum())
        fraction[row] = _fraction(float(there[row]), float(part[of_main].sum()), absorbed)
        top = int(part.argmax())
        full[row] = (
            not of_main.any()
            and cosine[latent[top]] >= FULL_COSINE
            and part[top] >= PROPORTION * there[row]
        )
    return Absorption(fraction, full)


def _fraction(there: float, main: float, absorbed: float) -> float:
    """The absorption fraction of a row, from A > 0, m and a."""
    if main >= there or absorbed < PROPORTION * there:
        return 0.0
    if main <= 0:
        return 1.0
    absorbed = min(absorbed, there - main)
    return absorbed / (absorbed + main)


def _check(x: Matrix, codes: sparse.csr_array, decoder: Matrix, direction: Matrix) -> None:
    shapes = {
        "x": x.shape,
        "codes": codes.shape,
        "decoder": decoder.shape,
        "direction": direction.shape,
    }
    rows, width = x.shape
    if shapes != {**shapes, "codes": (rows, len(decoder)), "direction": (width,)} or (
        decoder.shape[1] != width
    ):
        raise InputError("shapes do not fit", where="absorption", given=shapes)
    if not np.linalg.norm(direction) > 0:
        raise InputError("the direction has length 0", where="absorption")
