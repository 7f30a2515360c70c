"""Matryoshka SAEs: general features that special ones do not absorb, and what that costs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from sae.commands.train import train
from sae.evaluation.planted import PlantedConfig, PlantedDictionary
from sae.kernels.codes import SparseCodes
from sae.probing.planted_absorption import planted_absorption
from sae.reproduction.claims import Claim, claim, column, spread
from sae.reproduction.paper import Findings, Paper, Row, Settings
from saescope.pieces import Table
from saescope.progress import silent

_KINDS = ("matryoshka", "batchtopk")
_NAMES = {"matryoshka": "Matryoshka", "batchtopk": "BatchTopK"}
_WORLDS = {
    "planted": PlantedConfig(
        d_in=64,
        features=128,
        active=6,
        structure="hierarchical",
        children=3,
        child_probability=0.6,
        noise=0.05,
    ),
    "often": PlantedConfig(
        d_in=32,
        features=40,
        active=2,
        structure="hierarchical",
        children=4,
        child_probability=0.8,
    ),
}
_ROWS = {"planted": 60_000, "often": 40_000}
_PARTS = (("often", 2, 15), ("planted", 3, 3), ("planted", 6, 3))
"""world, L0 and passes: as many as fire, half as many, as many"""
_TESTED = 8000


def trials(quick: bool) -> list[Settings]:
    """Both kinds with every seed; of the first world alone if quick."""
    return [
        {
            "seed": seed,
            "kind": kind,
            "data": data,
            "d_sae": _WORLDS[data].features,
            "passes": passes,
            "k": k,
        }
        for data, k, passes in _PARTS[: 1 if quick else None]
        for seed in range(5)
        for kind in _KINDS
    ]


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Train one SAE; absorption of parents by their true direction, and the held-out error."""
    seed = settings["seed"]
    data = PlantedDictionary(replace(_WORLDS[settings["data"]], seed=seed))
    with silent():
        sae = train(
            data.sample(_ROWS[settings["data"]], stream=1).x,
            settings["kind"],
            d_sae=settings["d_sae"],
            k=settings["k"],
            passes=settings["passes"],
            batch_size=512,
            normaliser="centred",
            seed=seed,
        )
    x, true, _ = data.sample(_TESTED, stream=2)
    parent = np.full(settings["d_sae"], -1)
    parent[data.families[:, 1]] = data.families[:, 0]
    with torch.no_grad():
        codes = sae.encode_sparse(x)
        error = (x - sae.decode(codes, like=x)).square().sum()
    found = planted_absorption(
        (x - data.mean).double().numpy(),
        _as_matrix(codes),
        sae.decoder_directions().detach().double().numpy(),
        sparse.csr_array(true.double().numpy()),
        data.directions.double().numpy(),
        parent,
        seed=seed,
    )
    return {
        "fvu": float(error / (x - x.mean(0)).square().sum()),
        "l0": float(codes.l0().double().mean()),
        "fraction": _mean([each.fraction for each in found]),
        "full": _mean([each.full for each in found]),
        "f1": _mean([each.f1 for each in found]),
        "latents": _mean([len(each.main) for each in found]),
        "recall_with_child": _mean([each.recall_with_child for each in found]),
        "recall_alone": _mean([each.recall_alone for each in found]),
    }


def _as_matrix(codes: SparseCodes) -> sparse.csr_array:
    codes = codes.compact()
    entries = (codes.value.double().numpy(), codes.index.numpy(), codes.row_ptr.numpy())
    return sparse.csr_array(entries, shape=(codes.batch, codes.d_sae))


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def findings(rows: Sequence[Row]) -> Findings:
    """Matryoshka beside BatchTopK: absorption, and FVU."""
    claims = []
    for part in _parts(rows):
        claims += [
            _claim(rows, part, "fraction", "a lower absorption fraction"),
            _claim(rows, part, "full", "fewer rows that are fully absorbed"),
            _claim(rows, part, "fvu", "a price: higher FVU", lower=False),
        ]
    return Findings(
        claims=(*claims,),
        why=_WHY,
        tables=(*(_table(rows, part) for part in _parts(rows)),),
    )


_WHY = (
    "Where a child is nearly always with its parent, BatchTopK absorbs the parent, and "
    "Matryoshka a third as much, but its FVU is more than twice as high, a price far above the "
    "paper's. In the larger world, in which BatchTopK absorbs little, Matryoshka is no better, "
    "at half the L0 it is worse, and it pays there, too. Three of the claims that hold are the "
    "price."
)


def _parts(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Worlds and L0 that there are trials of."""
    there = {(row["data"], row["k"]) for row in rows}
    return [(data, k) for data, k, _ in _PARTS if (data, k) in there]


def _called(part: tuple[str, int]) -> str:
    world = _WORLDS[part[0]]
    return f"{world.features} features, {world.active:g} on a row, L0 {part[1]}"


def _values(rows: Sequence[Row], part: tuple[str, int], kind: str, value: str) -> list[float]:
    return column(rows, value, data=part[0], k=part[1], kind=kind)


def _claim(
    rows: Sequence[Row], part: tuple[str, int], value: str, says: str, *, lower: bool = True
) -> Claim:
    ours, null = (_values(rows, part, kind, value) for kind in _KINDS)
    return claim(f"{_called(part)}: {says} than of BatchTopK", ours, null, lower=lower)


_SHOWN = {
    "L0": ("l0", ".1f"),
    "FVU": ("fvu", ".3f"),
    "absorption fraction": ("fraction", ".3f"),
    "full absorption": ("full", ".3f"),
    "fires with a child": ("recall_with_child", ".3f"),
    "fires without": ("recall_alone", ".3f"),
    "F1": ("f1", ".3f"),
    "main latents": ("latents", ".2f"),
}


def _table(rows: Sequence[Row], part: tuple[str, int]) -> Table:
    return Table(
        title=f"Parents and children: {_called(part)}",
        about="On rows that were not trained on; ± is half of a 95% interval over seeds. Fires "
        "with a child: how often a parent's main latents fire on rows with it and a child of it.",
        columns=("SAE", *_SHOWN),
        rows=tuple(
            (
                _NAMES[kind],
                *(spread(_values(rows, part, kind, key), form) for key, form in _SHOWN.values()),
            )
            for kind in _KINDS
        ),
    )


PAPER = Paper(
    title="Learning multi-level features with Matryoshka sparse autoencoders",
    citation="Bussmann, Nabeshima, Karvonen and Nanda, ICML 2025, arXiv 2503.17547",
    claim="A BatchTopK SAE whose prefixes have to reconstruct alone keeps general features in its "
    "first ones, where an ordinary SAE has special features absorb them: absorption falls several "
    "times, at the price of a somewhat worse reconstruction at equal L0.",
    run=(
        "Planted families, a parent and its children: no child is without its parent, and a row "
        "has one child of a parent at most. Of 40 features in 32 dimensions 2 are on a row, and a "
        "parent has one of its four children with it in 8 cases of 10; of 128 in 64 dimensions 6 "
        "are on a row, one of three children in 6 of 10, with noise. SAEs have as many features; "
        "15 passes over 40,000 rows, 3 over 60,000. What is absorbed is told by the parents' true "
        "directions.",
        "The larger world was run first, and BatchTopK absorbs little in it; the smaller was "
        "taken, of three that were tried, because a BatchTopK SAE of it, of a world of another "
        "seed, absorbs most; those tries are not kept. All trials of both are here.",
        "Both kinds see the same batches, and have the same k. Prefixes are a sixteenth, an "
        "eighth, a quarter, a half and all of the dictionary, and none of it, weighted equally.",
    ),
    easier="It is an easier claim than the paper's, which is of Gemma-2-2B: features are planted, "
    "so that the truth is known, and few. The paper's first-letter task on a model, and its sparse "
    "probing and erasure, are not in these trials; `saescope eval --suite absorption` measures "
    "first letters of an SAE that you trained.",
    trials=trials,
    measure=measure,
    findings=findings,
    configs=("matryoshka-lm.toml",),
    scale="Gemma-2-2B, 36,864 features and 500 million tokens, on one GPU; not run here.",
)
