"""Codecs of a model's KV cache, fitted on training text: with trained dictionaries, and others."""

from collections.abc import Sequence
from math import ceil, log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations.models.coded_cache import Codec, Unrotated
from sae.analysis.cache_codecs import Calibrated, Grouped, Principal, Rows, Sparse
from sae.commands.train import train
from sae.reproduction.kv_subject import Scale, model_of, training_rows, unrotated_rows
from sae.reproduction.paper import Settings
from saescope.artefact import atomic_path
from saescope.progress import silent

_KIVI_GROUP = 32
"""channels of a token's value vector that share their ends"""


class Fitted(NamedTuple):
    """What codes a cache."""

    codecs: list[tuple[Codec, Codec]]
    """of keys and values of each layer"""
    constant_bits: int
    """what all of them keep once, for all texts"""


def _drawn(rows: Rows, count: int, seed: int) -> Tensor:
    """Vectors [count, d_head] of all heads."""
    generator = torch.Generator().manual_seed(seed)
    flat = rows.float().flatten(0, 1)
    return flat[torch.randperm(len(flat), generator=generator)[:count].to(flat.device)]


def _dictionaries(scale: Scale, seed: int, rows: Sequence[Rows], path: Path) -> list[Any]:
    """(atoms, mean) of each set of rows: SAEs with orthogonal matching pursuit, kept in a file."""
    if not path.exists():
        found = {}
        for number, each in enumerate(rows):
            with silent():
                sae = train(
                    _drawn(each, scale.vectors, seed).cpu(),
                    {"kind": "matching_pursuit", "orthogonal": True},
                    d_sae=scale.atoms,
                    k=scale.trained_k,
                    normaliser="centred",
                    passes=scale.passes,
                    batch_size=256,
                    lr=0.02,
                    seed=seed,
                )
            found |= {f"{number}.atoms": sae.W_dec.detach(), f"{number}.mean": sae.b_dec.detach()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(found, temporary)
    read = load_file(path, device=scale.device)
    return [(read[f"{n}.atoms"], read[f"{n}.mean"]) for n in range(len(rows))]


def _atoms(scale: Scale, settings: Settings, rows: Sequence[Rows], folder: Path) -> list[Any]:
    """(atoms, mean) of each set of rows: trained, drawn from the rows, or random."""
    seed, method = settings["seed"], settings["method"]
    if method == "sparse":
        sizes = (scale.training_tokens, scale.vectors, scale.atoms, scale.passes)
        name = "-".join([settings["keys"], *(f"{each:g}" for each in sizes), str(seed)])
        path = folder / "dictionaries" / f"{name}.safetensors"
        return _dictionaries(scale, seed, rows, path)
    generator, found = torch.Generator().manual_seed(seed), []
    for each in rows:
        drawn = _drawn(each, max(scale.atoms, scale.vectors), seed)
        mean = drawn.mean(0)
        atoms = drawn[: scale.atoms] - mean
        if method == "random":
            atoms = torch.randn(atoms.shape, generator=generator).to(atoms)
        found.append((torch.nn.functional.normalize(atoms, dim=1), mean))
    return found


def _other(scale: Scale, method: str, size: int, which: int, rows: Rows) -> Any:
    """A codec without a dictionary; which: 0 of keys, 1 of values."""
    if method == "kivi":
        if which:
            return Grouped(size, "token", min(_KIVI_GROUP, rows.shape[2]))
        return Grouped(size, "channel", scale.group)
    if method == "calibrated":
        return Calibrated.fit(rows, size)
    # 4 bits a component: no fewer than sparse codes of `size` atoms and their dictionary take
    index = ceil(log2(scale.atoms))
    return Principal.fit(rows, size and ceil(size * (index + 8) / 4) + 1, 4)


def fit(scale: Scale, settings: Settings, folder: Path) -> Fitted:
    """The codecs of a trial, by its "method", "size", "keys" and "seed".

    What is trained is kept in `folder`, and read if it is there.
    """
    method, size = settings["method"], settings["size"]
    rows = [each for both in training_rows(scale) for each in both]
    before = settings["keys"] == "unrotated"
    if before:
        rows = [unrotated_rows(scale, x) if n % 2 == 0 else x for n, x in enumerate(rows)]
    if method in ("sparse", "samples", "random"):
        both = _atoms(scale, settings, rows, folder)
        found: list[Any] = [
            Sparse.fit(x.float(), atoms, mean, size)
            for x, (atoms, mean) in zip(rows, both, strict=True)
        ]
    else:
        found = [_other(scale, method, size, n % 2, x.float()) for n, x in enumerate(rows)]
    constant = sum(each.constant_bits for each in found)
    if before:
        found[::2] = [Unrotated(model_of(scale), each) for each in found[::2]]
    return Fitted(list(zip(found[::2], found[1::2], strict=True)), constant)
