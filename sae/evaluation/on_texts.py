"""An SAE, its model, and what families need that look at texts of their own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.probing.config import ProbingConfig
from sae.probing.first_letter import AbsorptionConfig

if TYPE_CHECKING:
    from activations import Model


@dataclass(frozen=True, kw_only=True)
class OnTexts:
    """An SAE at one site of its model, and settings."""

    model: "Model"
    """what is taken apart"""
    site: str
    """whose activations the SAE reads"""
    sae: SparseAutoencoder
    """of this site, its weights in the model's units"""
    sae_hash: str
    """of its weights"""
    seen: Callable[[Tensor], Tensor]
    """what the SAE sees of activations [rows, d_in] of the site: these, or a lens' view of them"""
    some_rows: Callable[[], Tensor]
    """a few thousand activations [rows, d_in] of the harvest, as the SAE sees them"""
    probing: ProbingConfig
    """how labelled texts are probed"""
    absorption: AbsorptionConfig
    """which words absorption is measured on"""
    cache: Path
    """folder for activations of texts"""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """rows for a file beside the evaluation, by family"""
