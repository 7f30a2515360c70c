"""An SAE, its model, and what families need that look at texts of their own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.probing.representations import untrained
from sae.probing.text_features import Subject
from sae.probing.text_rows import Representation, RowCache, TextModel
from saescope.errors import InputError

if TYPE_CHECKING:
    from activations import Model

SettingsT = TypeVar("SettingsT")
_UNTRAINED_SEED = 0


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

    def reconstructing(self, family: str) -> SparseAutoencoder:
        """The SAE; InputError for a transcoder, whose features write elsewhere than it reads."""
        if self.sae.transcodes:
            raise InputError(
                f"{family} is of SAEs that reconstruct what they read, and this is a transcoder",
                where="suite",
                given=family,
            )
        return self.sae


def subject_of(
    given: OnTexts[Any], family: str, representation: Representation, max_tokens: int
) -> Subject:
    """The SAE beside an untrained one, on texts; InputError for a transcoder."""
    sae = given.reconstructing(family)
    return Subject(
        sae=sae,
        untrained=untrained(sae, given.some_rows(), _UNTRAINED_SEED),
        seen=given.seen,
        cache=given.row_cache(representation, max_tokens),
        sae_hash=given.sae_hash,
    )
