"""Names of features by the nearest word's embedding, beside what random directions are called.

A feature's name is the word whose embedding has the largest cosine with its decoder row (CLIP's
text side in Zaigrajew et al. 2025, section 5, after Oikarinen and Weng's CLIP-Dissect). Some word
is nearest to any direction at all, and the more words there are the nearer. So each cosine is put
beside those of random directions that vary as the embeddings do, each with its own nearest word: a
feature is named if its cosine is beyond all but a share of theirs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from saescope.errors import InputError, check_range
from saescope.integers import as_index


@dataclass(frozen=True, kw_only=True)
class ConceptNames:
    """The nearest word of each direction, and what counts as near."""

    word: Int[Tensor, " direction"]
    """number of the nearest word"""
    cosine: Float[Tensor, " direction"]
    """with that word's embedding, less the words' mean"""
    threshold: float
    """the cosine that random directions exceed in a share of cases"""

    @property
    def named(self) -> Bool[Tensor, " direction"]:
        """Whether a direction is nearer to its word than random ones are to theirs."""
        return self.cosine > self.threshold


def name_directions(
    directions: Float[Tensor, "direction d_in"],
    words: Float[Tensor, "word d_in"],
    null: Float[Tensor, "other d_in"],
    *,
    share: float = 0.01,
) -> ConceptNames:
    """Name directions by words' embeddings, as surely as `share` of `null`'s directions would be.

    Raises InputError for other widths than the words', fewer than two words, no null, or a share
    that is not between 0 and 1.
    """
    check_range("name_directions.share", share, above=0, below=1)
    as_index(len(words), where="name_directions.words", low=2)
    as_index(len(null), where="name_directions.null", low=1)
    if not directions.shape[1] == words.shape[1] == null.shape[1]:
        raise InputError(
            "has directions of another width than the words",
            where="name_directions",
            given=(directions.shape[1], null.shape[1]),
            allowed=str(words.shape[1]),
        )
    unit = functional.normalize(words - words.mean(0), dim=1)
    cosine, word = (functional.normalize(directions, dim=1) @ unit.T).max(1)
    other = (functional.normalize(null, dim=1) @ unit.T).amax(1)
    return ConceptNames(
        word=word, cosine=cosine, threshold=float(torch.quantile(other.double(), 1 - share))
    )


def like_rows(
    rows: Float[Tensor, "row d_in"], number: int, *, seed: int
) -> Float[Tensor, "number d_in"]:
    """Random Gaussian directions with the covariance of rows.

    So many of them, of unit length; equal seeds give equal ones.
    """
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(number, len(rows), generator=draw) @ (rows - rows.mean(0))
    return functional.normalize(mixed, dim=1)
