"""Outlier rows: the few whose norm is far above the median, which no loss should be ruled by.

Position 0 and special tokens are not in a harvest at all; this is for what is left, such as massive
activations at delimiters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from activations.loading.unshuffled import aligned_rows
from activations.storage.reader import ActivationStore
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class OutlierFilter:
    """Rows of a site whose norm exceeds `multiple` times the site's median norm are outliers.

    Raises InputError for a multiple that is not above 1, or a site whose median norm is 0.

    >>> import torch
    >>> rule = OutlierFilter(multiple=10.0, median={"a": 1.0})
    >>> rule.keep("a", torch.tensor([[3.0, 4.0], [6.0, 8.0], [60.0, 80.0]])).tolist()
    [True, True, False]
    """

    multiple: float
    """Largest norm kept, over the median norm."""
    median: Mapping[str, float]
    """Median norm of each site's training rows, in the model's units."""

    def __post_init__(self) -> None:
        check_range("outliers.multiple", self.multiple, above=1)
        for site, median in self.median.items():
            if not median > 0:
                raise InputError("the median norm is not above 0", where=site, given=median)

    @classmethod
    def fit(
        cls, store: ActivationStore, sites: Sequence[str], multiple: float, *, rows: int = 32768
    ) -> Self:
        """Medians over about `rows` training rows from all over the store.

        Raises InputError for an unknown site as well.
        """
        medians = {}
        for site in sites:
            pieces = aligned_rows(store, [site], split="train", limit=rows, spread=True)
            norms = [x.norm(dim=1).numpy() for (x,), _ in pieces]
            medians[site] = float(np.median(np.concatenate(norms)))
        return cls(multiple=multiple, median=medians)

    def keep(self, site: str, x: Float[Tensor, "*rows d_in"]) -> Bool[Tensor, "*rows"]:
        """Which rows, in the model's units, are no outliers. InputError for a site not fitted."""
        if site not in self.median:
            raise InputError(
                "no median norm was fitted for this site",
                where="outliers",
                given=site,
                allowed=tuple(self.median),
            )
        return x.norm(dim=-1) <= self.multiple * self.median[site]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {"multiple": self.multiple, "median": dict(self.median)}
