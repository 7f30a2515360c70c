"""What a harvest needs to know of a model, of whatever kind.

A kind of model is a subclass that says which inputs a corpus gives, and how to run on them:

    kind            an input                        positions of a sequence     file
    language        packed tokens                   tokens                      language.py
    text_encoder    a text, or a slice of one       tokens, then padding        text_encoder.py
    vision          a picture                       the feature map's, by rows  vision.py
    diffusion       a prompt at a denoising step    the latent picture's        diffusion.py
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from activations.corpora.documents import CorpusConfig, Document, DocumentStream
from activations.corpora.sequences import PLAIN, PackingCounts, PackingOptions, Sequences
from activations.models.files import hash_of_weights
from activations.models.matmul_precision import Products
from activations.sites.modules import ModuleSites, SiteMap


class HarvestModel(ABC):
    """A model with its sites, the inputs that a corpus gives it, and its run on them."""

    kind: ClassVar[str]
    _sites: SiteMap | ModuleSites

    def __init__(
        self, module: nn.Module, *, spec: str, folder: Path, revision: str | None = None
    ) -> None:
        self.module = module
        self.spec = spec
        self.name = Path(spec).name if Path(spec).is_dir() else spec
        self.revision = revision
        self.folder = folder
        # parameters that wait on the disk or in main memory for their turn are "meta"
        here = next(each for each in module.parameters() if each.device.type != "meta")
        self.dtype: torch.dtype = here.dtype
        self.device: torch.device = here.device
        self.products: Products = "own"
        self.code_hash: str | None = None

    @property
    def dtype_name(self) -> str:
        """The precision, named as in configuration."""
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over the model's weight files, whatever precision they were loaded in."""
        return hash_of_weights(self.folder)

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a harvest's manifest says of the model."""

    def resolve(self, site: str | Sequence[str]) -> list[str]:
        """The sites that names or patterns stand for, each once.

        Raises InputError for a site this model does not have, naming the nearest that it has.
        """
        return self._sites.resolve([site] if isinstance(site, str) else site)

    @abstractmethod
    def d_in(self, site: str) -> int:
        """Width of a site, found by running the model. Raises InputError for an unknown site."""

    @abstractmethod
    def capture(
        self, inputs: Any, /, sites: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos d_in"]]:
        """Activations at the sites, in the model's precision; nothing deeper is computed.

        Raises InputError for an unknown site, or inputs that the model cannot take.
        """

    @abstractmethod
    def example(self, count: int, positions: int | None = None) -> Any:
        """Inputs of no meaning for so many sequences, of so many positions where one can choose."""

    def documents(
        self, corpus: CorpusConfig, *, first: int = 0, state: Any = None
    ) -> Iterable[Document]:
        """What a corpus holds for this kind of model, numbered from `first`.

        Args: state is that of an earlier stream, to go on from (see `DocumentStream`).

        Raises InputError as corpora do.
        """
        return DocumentStream(corpus, first=first, state=state)

    @abstractmethod
    def sequences(
        self,
        documents: Iterable[Document],
        *,
        context: int,
        per_group: int,
        counts: PackingCounts,
        limit: int | None = None,
        packing: PackingOptions = PLAIN,
    ) -> Iterator[Sequences]:
        """Groups of `per_group` sequences of some documents, the last one smaller.

        Args: packing is for language models; a configuration of another kind cannot ask for it.
        """

    @abstractmethod
    def inputs(self, group: Sequences, chosen: NDArray[np.int64]) -> Any:
        """What to run the model on for some sequences of a group."""

    @abstractmethod
    def keep_mask(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Which positions count in statistics and training."""

    def vocabulary(self) -> list[str | bytes] | None:
        """The text of every token id by itself; None where inputs are not tokens."""
        return None

    @abstractmethod
    def check_rows(self, sites: Sequence[str], rows: str, context: int) -> None:
        """Raise InputError if sites cannot give such rows with so many positions a sequence."""

    def rows_per_sequence(self, rows: str, context: int) -> int:
        """The most rows that a sequence has: one where `rows` is "mean"."""
        return 1 if rows == "mean" else context
