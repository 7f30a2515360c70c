"""An SAE, its model, and what families need that look at texts of their own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.probing.text_rows import Representation, RowCache, TextModel

if TYPE_CHECKING:
    from activations import Model

SettingsT = TypeVar("SettingsT")


@dataclass(frozen=True, kw_only=True)
class OnTexts(Generic[SettingsT]):
    """An SAE at one site of its model, and a family's settings."""

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
    settings: SettingsT
    """the family's"""
    cache: Path
    """folder for activations of texts"""
    cache_limit: int
    """bytes that this folder may hold"""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """rows for a file beside the evaluation, by family"""

    def row_cache(self, representation: Representation, max_tokens: int) -> RowCache:
        """Activations of texts at the site, computed or read from the cache's folder."""
        of = TextModel(
            model=self.model,
            site=self.site,
            representation=representation,
            max_tokens=max_tokens,
        )
        return RowCache(self.cache, of, limit=self.cache_limit)
