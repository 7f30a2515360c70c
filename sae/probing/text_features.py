"""Texts as three SAEs see them: the one that is measured, and two controls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.probing.divisions import Indices
from sae.probing.logistic import Matrix
from sae.probing.representations import activations_of, features_of
from sae.probing.text_rows import RowCache, TextRows

Method = Literal["sae", "random", "untrained"]
METHODS: dict[Method, str] = {
    "sae": "the SAE's features of largest effect",
    "random": "as many of the SAE's features that fire on training texts, drawn at random",
    "untrained": "those of largest effect of an SAE of this shape that was never trained",
}


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """Activations and features of texts."""

    x: Matrix
    """[texts, d_in], averaged over a text's kept positions where the representation is "mean\""""
    codes: "Mapping[str, sparse.csr_array]"
    """features [texts, d_sae] by SAE, "sae" and "untrained", averaged likewise"""

    def known(self, kept: Indices) -> "TextFeatures":
        """Those of some of the texts."""
        codes = {name: sparse.csr_array(each[kept]) for name, each in self.codes.items()}
        return TextFeatures(x=self.x[kept], codes=codes)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An SAE beside an untrained one, on rows of a cache."""

    sae: SparseAutoencoder
    untrained: SparseAutoencoder
    seen: Callable[[Tensor], Tensor]
    """what they see of activations [rows, d_in]"""
    cache: RowCache
    sae_hash: str
    """of the weights"""

    def key(self) -> list[Any]:
        """What decides the features of texts."""
        return [self.sae_hash, self.cache.of.protocol()]

    def features(self, name: str, texts: Sequence[str]) -> tuple[TextFeatures, Indices]:
        """Of the texts that have a kept position, and their indices among all."""
        rows = self.cache.rows(name, texts)
        known = np.flatnonzero(rows.known(len(texts)))
        seen = TextRows(x=self.seen(rows.x.float()), text=rows.text)
        codes = {
            which: features_of(sae.encode_sparse, seen, len(texts))
            for which, sae in (("sae", self.sae), ("untrained", self.untrained))
        }
        return TextFeatures(x=activations_of(seen, len(texts)), codes=codes).known(known), known

    @cached_property
    def decoders(self) -> dict[str, Matrix]:
        """What features write [d_sae, d_in], by SAE."""
        both = {"sae": self.sae, "untrained": self.untrained}
        with torch.no_grad():
            return {name: each.W_dec.double().cpu().numpy() for name, each in both.items()}

    def by_method(
        self, features: TextFeatures, train: Indices, seed: Sequence[int]
    ) -> "Iterator[tuple[Method, sparse.csr_array, Matrix, Indices | None]]":
        """Of each method its features, what they write, and their order where `seed` draws it."""
        fires = np.flatnonzero(np.asarray(abs(features.codes["sae"][train]).sum(0)).ravel())
        drawn = np.random.default_rng(seed).permutation(fires)
        for method in METHODS:
            which = "untrained" if method == "untrained" else "sae"
            order = drawn if method == "random" else None
            yield method, features.codes[which], self.decoders[which], order
