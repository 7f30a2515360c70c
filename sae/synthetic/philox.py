"""Random numbers that are functions of a counter: Philox 4x32-10 (Salmon et al. 2011).

Whoever asks for row 10^9 needs no row before it, and gets the same on every device and however many
threads share the work.
"""

import math

import numpy as np
import torch
from torch import Tensor

Key = tuple[int, int]
"""two words of 32 bits"""
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def key_of(*numbers: int) -> Key:
    """A key for these numbers of at least 0; different numbers give unrelated ones."""
    first, second = np.random.SeedSequence(numbers).generate_state(2)
    return int(first), int(second)


def words(row: Tensor, block: Tensor | int, purpose: int, key: Key) -> Tensor:
    """Four random words of 32 bits, int64 [..., 4], for each counter (row, block, purpose).

    Args:
        row: int64, of 64 bits; row and block are broadcast against each other.
        block: of 32 bits.
        purpose: of 32 bits.
    """
    rows, blocks = torch.broadcast_tensors(row, torch.as_tensor(block, device=row.device))
    a, b, c = rows & _LOW, (rows >> 32) & _LOW, blocks & _LOW
    d = torch.full_like(a, purpose)
    first, second = key
    for _ in range(_ROUNDS):
        # of 64 bits, and of their sign nothing is left
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = ((right >> 32) & _LOW) ^ b ^ first
        c = ((left >> 32) & _LOW) ^ d ^ second
        b, d = right & _LOW, left & _LOW
        first, second = (first + _STEPS[0]) & _LOW, (second + _STEPS[1]) & _LOW
    return torch.stack([a, b, c, d], dim=-1)


def uniform(word: Tensor) -> Tensor:
    """Words as float64 numbers between 0 and 1, neither of which they reach."""
    return (word.double() + 0.5) * 2.0**-32


def normal_pair(word: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers, float64, of two words (Box and Muller 1958)."""
    radius = (-2 * uniform(word).log()).sqrt()
    angle = 2 * math.pi * uniform(other)
    return radius * angle.cos(), radius * angle.sin()
