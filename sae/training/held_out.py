"""Held-out measurements during training, of one site or of several, and calibration rows."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.core.batch import RawBatch
from sae.core.finite import check_finite
from sae.evaluation.reconstruction import Reconstruction, measure_reconstruction, pool
from sae.training.batch_maker import BatchMaker

HeldOutRows = Callable[[], Iterable[RawBatch | Tensor]]
"""fresh iterators of rows that are never trained on"""
_ROWS = 4096


def _raw(sae: SparseAutoencoder, batches: Iterable[RawBatch | Tensor]) -> Iterator[RawBatch]:
    for each in batches:
        raw = (RawBatch(each) if isinstance(each, Tensor) else each).to(sae.b_dec.device)
        check_finite(raw, "held-out rows")
        yield raw


def measure(sae: SparseAutoencoder, held_out: HeldOutRows) -> dict[str, Any]:
    """L0, FVU, cosine and the like; of a several-layer SAE the mean over layers, and each layer's.

    A feature of a several-layer SAE is dead if it fires at no layer.
    """
    if not sae.site_normalisers:
        found = measure_reconstruction(sae, lambda: _rows(sae, held_out))
        return _summary(found)
    layers = {
        site: measure_reconstruction(sae.at(site), lambda n=number: _layer(sae, held_out, n))
        for number, site in enumerate(sae.site_normalisers)
    }
    return {
        **_summary(pool(layers)),
        "layers": {site: _summary(found) for site, found in layers.items()},
    }


def normalised_rows(maker: BatchMaker, held_out: HeldOutRows) -> Callable[[], Iterator[Tensor]]:
    """A function that gives fresh iterators of the encoder's input, y [n, d_in], normalised."""

    def rows() -> Iterator[Tensor]:
        for raw in _raw(maker.sae, held_out()):
            yield from maker.normalised(raw).split(_ROWS)

    return rows


def _rows(sae: SparseAutoencoder, held_out: HeldOutRows) -> Iterator[Any]:
    for raw in _raw(sae, held_out()):
        yield raw.x if raw.target is None else (raw.x, raw.target)


def _layer(sae: SparseAutoencoder, held_out: HeldOutRows, number: int) -> Iterator[Tensor]:
    for raw in _raw(sae, held_out()):
        if raw.group is not None:
            yield raw.x[raw.group == number]


def _summary(found: Reconstruction) -> dict[str, Any]:
    names = ("l0", "fvu", "cosine", "dead_fraction", "rows")
    return {name: getattr(found, name) for name in names}
