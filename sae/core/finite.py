"""Checks that rows of activations are finite, naming the first that is not."""

import torch
from torch import Tensor

from sae.core.batch import RawBatch
from saescope.errors import InputError


def check_finite(raw: RawBatch, where: str) -> None:
    """Raise InputError if any number of a batch's x or target is NaN or infinite."""
    for name, values in (("activations", raw.x), ("targets", raw.target)):
        if values is not None:
            then = "; check the harvest"
            check_rows(values, where, name=name, row_token=raw.row_token, then=then)


def check_rows(
    values: Tensor,
    where: str,
    *,
    name: str = "activations",
    row_token: Tensor | None = None,
    then: str = "",
) -> None:
    """Raise InputError if any number of rows [n, d] is NaN or infinite, saying which row.

    One sum tells: a NaN or an infinity stays in it. Only a sum that is not finite, which may also
    have overflowed, has rows looked at one by one.
    """
    if torch.isfinite(values.detach().sum()):
        return
    bad = (~torch.isfinite(values).all(dim=1)).nonzero()[:, 0]
    if not len(bad):
        return
    row = int(bad[0])
    token = "" if row_token is None else f", of token {int(row_token[row])}"
    raise InputError(
        f"rows of {name} that are not finite: {len(bad)} of {len(values)}, the first is "
        f"row {row}{token}{then}",
        where=where,
    )
