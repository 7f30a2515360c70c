"""Rows that are not finite are found before anything is made of them."""

import torch

from sae.batch import RawBatch
from saescope.errors import InputError


def check_finite(raw: RawBatch, where: str) -> None:
    """Raise InputError if any number of a batch's x or target is NaN or infinite.

    One sum a tensor tells: a NaN or an infinity stays in it. Only a sum that is not finite, which
    may also have overflowed, has rows looked at one by one.
    """
    for name, values in (("activations", raw.x), ("targets", raw.target)):
        if values is None or torch.isfinite(values.sum()):
            continue
        bad = (~torch.isfinite(values).all(dim=1)).nonzero()[:, 0]
        if len(bad):
            row = int(bad[0])
            token = "" if raw.row_token is None else f", of token {int(raw.row_token[row])}"
            raise InputError(
                f"rows of {name} that are not finite: {len(bad)} of {len(raw)}, the first is "
                f"row {row}{token}; check the harvest",
                where=where,
            )
