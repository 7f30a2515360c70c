"""Inference thresholds: running averages of training, or set by rows for the mean L0 asked for."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from sae import kernels
from sae.core.base import SparseAutoencoder, kind_of
from sae.distributed import ALL, ROWS
from saescope.errors import InputError
from saescope.progress import say

_CALIBRATION_ROWS = 2048
"""rows encoded at a time by `calibrate`"""


def smallest_of(values: Tensor) -> Tensor:
    """The smallest of all ranks' values [entries], without gradient; inf if there is none."""
    none = values.new_full((1,), torch.inf)
    return ALL.min(torch.cat([values.detach(), none]).min())


def running_mean_(mean: Tensor, value: Tensor, updates: Tensor, decay: float) -> None:
    """Move a running average in place, and count it; the first update sets it (no bias).

    With t updates the mean is sum_s decay^(t-s) v_s / sum_s decay^(t-s).
    """
    updates += 1
    weight = (1 - decay) / (1 - decay ** updates.to(torch.float64))
    mean += (weight * (value - mean)).to(mean.dtype)


def calibrated_threshold(
    sae: SparseAutoencoder,
    rows: Callable[[], Iterable[Tensor]],
    weight: Tensor | None,
    k: float,
    read: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """The threshold that pre-activations, times weight [d_sae], pass k times a row on average.

    0, with a printed notice, if fewer are positive: all of these then pass. rows gives fresh
    iterators of y [n, d_in] at the normaliser's scale, of which `read` makes what the encoder
    multiplies (its usual input if not given). Raises InputError without rows.
    """
    hint, read = 0.0, read or sae.encoder_input
    seen = positive = 0

    def largest(some: Tensor, n: int) -> Tensor:
        nonlocal hint, seen, positive
        own = some[ROWS.share(len(some))]
        _, index, value = kernels.encode_top_of_batch(
            read(own), sae.W_enc_T, sae.b_enc, n, weight=weight, hint=hint
        )
        score = ALL.gather(value if weight is None else value * weight[index])
        hint = float(score.min()) if len(score) == n else 0.0
        seen, positive = seen + len(some), positive + len(score)
        return score

    def chunks() -> Iterator[tuple[int, Callable[[int], Tensor]]]:
        nonlocal seen, positive
        seen = positive = 0
        for y in rows():
            for some in y.split(_CALIBRATION_ROWS):
                yield len(some), partial(largest, some)

    threshold = threshold_for_l0(chunks, k)
    if not threshold and positive < round(k * seen):
        say(
            f"{kind_of(sae.config)}: an L0 of {k:g} cannot be reached by thresholds: "
            f"{positive / seen:.1f} pre-activations a row are above 0, and all of them now count"
        )
    return threshold


def threshold_for_l0(
    chunks: Callable[[], Iterable[tuple[int, Callable[[int], Tensor]]]], k: float
) -> float:
    """The threshold >= 0 above which lie k scores a row: exactly round(k rows), but for ties.

    chunks gives fresh iterators of (number of rows, what gives the n largest positive scores of
    those rows). The largest of each are kept, and the threshold read off their order, half way
    between two: one pass, unless rows differ so much from chunk to chunk that too few were kept. 0
    if fewer are positive. Raises InputError without rows.
    """
    margin = 2.0
    while True:
        rows, bar, kept = 0, 0.0, []
        for number, largest in chunks():
            rows += number
            wanted = math.ceil(margin * k * number) + 1
            value = largest(wanted)
            if len(value) == wanted:  # perhaps more; above the bar is all kept
                bar = max(bar, float(value.min()))
            kept.append(value.float())
        if not rows:
            raise InputError("no rows to calibrate on", where="calibrate", given=0)
        values = torch.cat(kept).sort(descending=True).values
        count = max(1, round(k * rows))
        if len(values) > count and float(values[count]) >= bar:
            upper, lower = values[count - 1 : count + 1].double().tolist()
            middle = float(torch.tensor((upper + lower) / 2, dtype=torch.float32))
            return middle if middle < upper else lower
        if len(values) <= count and not bar:
            return 0.0
        margin *= 4
