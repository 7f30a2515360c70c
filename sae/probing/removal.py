"""Removing a concept by ablating features: spurious correlation removal, targeted perturbation.

Features are ranked by how much of a probe's log-odds they carry from one class to the other
(Karvonen et al. 2024, arXiv 2411.18895; in SAEBench):

    effect_i = (mean f_i with the label - mean f_i without) * (w . W_dec_i)

with f_i averaged over a text's kept positions and w the probe's weights on raw activations. The
features of largest effect are set to 0 and the SAE's error is kept,

    x' = x + decode(f') - decode(f) = x - sum_i f_i W_dec_i

which is exact, since decoders are linear, and of a mean over positions it is the mean.
"""

import numpy as np

from sae.probing.divisions import Indices
from sae.probing.logistic import Labels, Matrix, Probe
from sae.probing.selection import Features, columns


def direction(probe: Probe) -> Matrix:
    """The probe's weights [d_in] on activations that are not standardised."""
    return probe.weight / probe.scale


def effects(codes: Features, y: Labels, decoder: Matrix, probe: Probe, *, signed: bool) -> Matrix:
    """The effect of each feature [d_sae] on a probe.

    Args:
        codes: features [texts, d_sae] of training texts with labels y [texts].
        decoder: what each feature writes [d_sae, d_in].
        signed: count only features that fire more with the label, as targeted probe perturbation
            does; otherwise the size of the effect, as spurious correlation removal does.

    >>> y = np.array([False, True])
    >>> probe = Probe(np.zeros(1), np.ones(1), np.array([3.0]), 0.0, 1.0)
    >>> codes, decoder = np.array([[0.0, 4.0], [2.0, 0.0]]), np.array([[1.0], [0.5]])
    >>> effects(codes, y, decoder, probe, signed=False)
    array([6., 6.])
    """
    difference = _mean(codes[y]) - _mean(codes[~y])
    if signed:
        return np.maximum(difference, 0.0) * (decoder @ direction(probe))
    return np.abs(difference * (decoder @ direction(probe)))


def _mean(codes: Features) -> Matrix:
    return np.asarray(codes.sum(0)).ravel() / codes.shape[0]  # type: ignore[index]


def largest(effect: Matrix, n: int) -> Indices:
    """The n features of largest effect, the largest first, of equal ones the first; those without
    any effect are never among them.

    >>> largest(np.array([0.0, 2.0, -1.0, 2.0]), 3).tolist()
    [1, 3, 2]
    """
    order = np.argsort(-effect, kind="stable")
    return order[effect[order] != 0][:n]


def without(x: Matrix, codes: Features, decoder: Matrix, chosen: Indices) -> Matrix:
    """Activations x [texts, d_in] with the chosen features set to 0 and the error kept.

    Without a chosen feature that fires they are x, bit for bit.
    """
    return x - columns(codes, chosen) @ decoder[chosen]
