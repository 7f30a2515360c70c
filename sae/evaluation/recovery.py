"""Recovery of planted features, controls that were not trained, and absorption.

Recovery of a true direction is the largest |cos| that a row of the dictionary has with it; it grows
with the number of rows, so it means something only beside a control of the same size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from saescope.errors import InputError
from saescope.integers import as_index

FOUND = 0.9
"""|cos| above which a true direction counts as found"""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How well a dictionary's rows agree with the true directions."""

    best: Tensor
    """[features], largest |cos| of each true direction with a row"""
    latent: Tensor
    """int64 [features], the row that has it"""
    mean: float
    """mean of `best`"""
    found: float
    """part of the true directions with `best` above 0.9"""
    matched: float
    """mean |cos| when each row may serve one direction only, best assignment; 0 for the unserved"""


def measure_recovery(directions: Tensor, dictionary: Tensor) -> Recovery:
    """Compare true directions [features, d] with the rows of a dictionary [d_sae, d], any scale.

    Raises InputError if the widths differ or a true direction is 0.
    """
    if directions.ndim != 2 or dictionary.ndim != 2 or directions.shape[1] != dictionary.shape[1]:
        raise InputError(
            "true directions and dictionary must be matrices of equal width",
            where="measure_recovery",
            given=(tuple(directions.shape), tuple(dictionary.shape)),
        )
    if not bool(directions.norm(dim=1).gt(0).all()):
        raise InputError("a true direction is 0", where="measure_recovery")
    cosine = cosines(directions, dictionary).abs()
    best, latent = cosine.max(dim=1)
    assigned = best_assignment(cosine)
    served = assigned >= 0
    return Recovery(
        best=best,
        latent=latent,
        mean=float(best.mean()),
        found=float((best > FOUND).double().mean()),
        matched=float(cosine[served, assigned[served]].sum()) / len(directions),
    )


def by_frequency(value: Tensor, frequency: Tensor, parts: int = 10) -> list[float]:
    """Mean of value [features] in parts of (nearly) equal size, rarest features first.

    Raises InputError for fewer features than parts.
    """
    parts = as_index(parts, where="by_frequency.parts", low=1, high=len(value))
    order = frequency.argsort(stable=True)
    return [float(value[part].mean()) for part in order.tensor_split(parts)]


def cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Cosine of every row [a, d] with every other [b, d]: [a, b]; 0 where a row is 0."""
    return (
        functional.normalize(rows.detach().double(), dim=1)
        @ functional.normalize(others.detach().double(), dim=1).T
    )


def best_assignment(value: Tensor) -> Tensor:
    """Column of each row [rows, columns] so that the sum of values is largest; no column twice.

    int64 [rows]; -1 for rows left over when there are more rows than columns.
    """
    from scipy.optimize import linear_sum_assignment  # takes a while, and few need it

    row, column = linear_sum_assignment(value.detach().double().cpu().numpy(), maximize=True)
    columns = torch.full((len(value),), -1, dtype=torch.int64)
    columns[torch.from_numpy(row)] = torch.from_numpy(column)
    return columns


# ---- controls ---------------------------------------------------------------------------------


def principal_directions(x: Tensor, count: int) -> Tensor:
    """The first principal directions of x [rows, d], as rows [min(count, d), d]."""
    count = as_index(count, where="principal_directions.count", low=1)
    centred = x.double() - x.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors.flip(1).T[:count]


def nonnegative_parts(x: Tensor, count: int, *, steps: int = 100, seed: int = 0) -> Tensor:
    """Parts [count, d] of a non-negative factorisation of x [rows, d], as directions in x's space.

    Each coordinate is shifted so that its smallest value is 0; what the shift gives to all parts
    alike, their mean, is taken off them again. Multiplicative updates for the squared error (Lee
    and Seung 2001).
    """
    count = as_index(count, where="nonnegative_parts.count", low=1)
    steps = as_index(steps, where="nonnegative_parts.steps", low=1)
    data = (x - x.amin(0)).float()
    generator = torch.Generator().manual_seed(seed)
    scale = float(data.mean() / count) ** 0.5
    weight = scale * torch.rand(len(data), count, generator=generator)
    part = scale * torch.rand(count, data.shape[1], generator=generator)
    # what shrinks towards 0 stops here: numbers below the smallest normal float are slow
    floor = 1e-9 * scale
    for _ in range(steps):
        weight = (weight * (data @ part.T) / (weight @ (part @ part.T))).clamp_min(floor)
        part = (part * (weight.T @ data) / ((weight.T @ weight) @ part)).clamp_min(floor)
    return part - part.mean(0) if count > 1 else part


# ---- absorption -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Absorption:
    """Of a parent feature by its children's latents; each is a mean over (parent, child) pairs."""

    rate: float
    """part of the rows with the child on where the parent is fully absorbed"""
    fraction: float
    """mean part of the parent's amount that other latents carry on those rows"""
    missed: float
    """part of those rows where the parent's latent does not fire (its false negatives)"""
    missed_alone: float
    """part of the rows with the parent on and no child on where its latent does not fire"""
    found: float
    """part of the parents whose latent has |cos| above 0.9 with them"""


def measure_absorption(
    encode: Callable[[Tensor], Tensor],
    dictionary: Tensor,
    *,
    x: Tensor,
    codes: Tensor,
    directions: Tensor,
    families: Tensor,
    min_cosine: float = 0.1,
    min_share: float = 0.4,
) -> Absorption:
    """Absorption of parents on x [rows, d], true codes [rows, features] and families [pairs, 2].

    encode gives latents [rows, d_sae] and dictionary is [d_sae, d], both in x's units. A parent's
    latent is the one whose row has the largest |cos| with the parent's direction p. Latent i
    carries f_i <W_dec,i, p> of the parent's true amount s. A row is fully absorbed when the
    parent's latent does not fire and the latent that carries most, of those with a |cos| of at
    least min_cosine with p, carries at least min_share of s. The fraction is that of SAEBench
    (Karvonen et al. 2025) with s for the probe's projection: 0 where the parent's latent carries s,
    or where the three other latents that carry most carry less than min_share of s together; else
    a / (a + what the parent's latent carries), a = what they carry, at most what is missing.
    Raises InputError without families, or if a parent alone or a child is never on.
    """
    if not len(families):
        raise InputError("there are no (parent, child) pairs", where="measure_absorption")
    latents = encode(x).detach().double()
    sums: list[tuple[float, ...]] = []
    own = cosines(directions, dictionary).abs()
    for parent, child in families.tolist():
        siblings = families[families[:, 0] == parent, 1]
        main = int(own[parent].argmax())
        with_child = codes[:, child] > 0
        alone = (codes[:, parent] > 0) & ~(codes[:, siblings] > 0).any(1)
        if not (with_child.any() and alone.any()):
            raise InputError(
                "too few rows: a parent or a child is never on", where="measure_absorption"
            )
        carried = latents[with_child] * (dictionary.double() @ directions[parent].double())
        mine = carried[:, main].clone()
        carried[:, own[parent] < min_cosine] = 0
        carried[:, main] = 0
        amount = codes[with_child, parent].double()
        silent = latents[with_child, main] == 0
        full = silent & (carried.amax(1) >= min_share * amount)
        sums.append(
            (
                float(full.double().mean()),
                float(_absorbed(mine, carried, amount, min_share).mean()),
                float(silent.double().mean()),
                float((latents[alone, main] == 0).double().mean()),
                float(own[parent, main] > FOUND),
            )
        )
    rate, fraction, missed, missed_alone, found = torch.tensor(sums).mean(0).tolist()
    return Absorption(
        rate=rate, fraction=fraction, missed=missed, missed_alone=missed_alone, found=found
    )


def _absorbed(mine: Tensor, carried: Tensor, amount: Tensor, min_share: float) -> Tensor:
    """SAEBench's absorption fraction of each row."""
    others = carried.clamp_min(0).topk(min(3, carried.shape[1]), dim=1).values.sum(1)
    mine = mine.clamp_min(0)
    absorbed = others.minimum(amount - mine)
    part = absorbed / (absorbed + mine).clamp_min(1e-12)
    return torch.where((mine >= amount) | (others < min_share * amount), 0.0, part)
