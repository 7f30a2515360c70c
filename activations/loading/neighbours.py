"""Rows in a random order in which neighbouring tokens stay together, two by two."""

import numpy as np
from numpy.typing import NDArray

from activations.loading.epoch_order import ReadingOrder
from saescope.errors import InputError


def check_has_neighbours(reading: ReadingOrder, mix_chunks: int) -> None:
    """Raise InputError unless rows that are shuffled together are of whole windows.

    A window's rows are dealt over its chunks, so one chunk has few tokens that are neighbours.
    """
    if reading.order != "windows":
        raise InputError(
            "neighbouring tokens are read together only where whole windows are",
            where="order",
            given=reading.order,
            allowed="windows",
        )
    if mix_chunks < reading.window_chunks:
        raise InputError(
            "a window has more chunks than are shuffled together, so neighbouring tokens are apart",
            where="mix_chunks",
            given=mix_chunks,
            allowed=f"{reading.window_chunks} or more",
        )


def paired_order(
    row_token: NDArray[np.int64], context: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """A random order of rows in which two neighbouring tokens follow each other, earlier one first.

    Each run of tokens whose rows are all there is cut into twos, from its first or second token by
    the toss of a coin, and these are shuffled; what is left over at a run's ends stands alone. So
    every row is taken once, and any two neighbours are together in about every other epoch.

    Args: row_token int64 [rows], the flat token of each, sequence * context + position.

    >>> paired_order(np.array([7, 3, 2, 6]), 4, np.random.default_rng(0)).tolist()
    [3, 0, 1, 2]
    """
    by_token = np.argsort(row_token, kind="stable")
    token = row_token[by_token]
    begins = np.ones(len(token), bool)
    begins[1:] = (np.diff(token) != 1) | (token[1:] % context == 0)
    run = np.cumsum(begins) - 1
    place = np.arange(len(token)) - np.flatnonzero(begins)[run]
    shift = random.integers(0, 2, run[-1] + 1 if len(run) else 0)[run]
    two = np.cumsum(begins | ((place + shift) % 2 == 0)) - 1
    turn = random.permutation(two[-1] + 1 if len(two) else 0)
    return by_token[np.argsort(turn[two], kind="stable")]
