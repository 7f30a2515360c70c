"""Models of any kind, harvested at their modules: what a harvest needs to know of one.

A kind of model is a subclass that says which inputs a corpus gives, and how to run on them:

    kind            an input                        positions of a sequence
    text_encoder    a text, or a part of a long one tokens, filled up with padding
    vision          a picture                       places of the feature map, row by row
    diffusion       a prompt at a denoising step    places of the latent picture's feature map
"""

import sys
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
from activations.corpora.packing import PackingCounts, Sequences
from activations.models.config import DenoisingConfig
from activations.models.files import SPREAD, device_of, hash_of_weights
from activations.models.foreign_code import hash_of_code
from activations.models.matmul_precision import Products, multiplied_in
from activations.sites.hooks import run_until_captured, shapes_of
from activations.sites.modules import ModuleSites
from saescope.errors import InputError

_PROBED = 3


class RawModel(ABC):
    """A PyTorch model with the inputs that it is run on; its sites are its modules.

    >>> encoder = load_model("minilm", kind="text_encoder")  # doctest: +SKIP
    >>> encoder.resolve("module:encoder.layer.*:output")[:1]  # doctest: +SKIP
    ['module:encoder.layer.0:output']
    """

    kind: ClassVar[str]

    def __init__(
        self, module: nn.Module, *, spec: str, folder: Path, revision: str | None = None
    ) -> None:
        self.module = module.requires_grad_(requires_grad=False).eval()
        self.spec = spec
        self.name = Path(spec).name if Path(spec).is_dir() else spec
        self.revision = revision
        self.folder = folder
        parameter = next(module.parameters())
        self.dtype: torch.dtype = parameter.dtype
        self.device: torch.device = parameter.device
        self.products: Products = "own"
        self.code_hash: str | None = None
        self._sites = ModuleSites(module, spec)
        self._shapes: dict[str, tuple[int, int]] = {}

    @property
    def dtype_name(self) -> str:
        """The precision, named as in configuration."""
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over the model's weight files, whatever precision they were loaded in."""
        return hash_of_weights(self.folder)

    @cached_property
    def inputs_hash(self) -> str:
        """Of all that makes the model's inputs from a corpus: tokenizer, size of pictures, ..."""
        return self._hash_of_inputs()

    @abstractmethod
    def _hash_of_inputs(self) -> str: ...

    @property
    @abstractmethod
    def n_ctx(self) -> int | None:
        """The most positions, where the model has a limit."""

    def facts(self) -> dict[str, Any]:
        """What a harvest's manifest says of the model."""
        return {
            "name": self.name,
            "kind": self.kind,
            "spec": self.spec,
            "revision": self.revision,
            "weights_hash": self.weights_hash,
            "inputs_hash": self.inputs_hash,
            "dtype": self.dtype_name,
            "products": self.products,
            "n_ctx": self.n_ctx,
            **({"code_hash": self.code_hash} if self.code_hash else {}),
        }

    def resolve(self, site: str | Sequence[str]) -> list[str]:
        """The sites that names or patterns stand for, each once.

        Raises InputError for a site this model does not have, naming the nearest that it has.
        """
        return self._sites.resolve([site] if isinstance(site, str) else site)

    def positions(self, site: str) -> int:
        """Positions that a site has for the inputs of `_example`."""
        return self._shape(site)[0]

    def d_in(self, site: str) -> int:
        """Width of a site, found by running the model on inputs of no meaning."""
        return self._shape(site)[1]

    def _shape(self, site: str) -> tuple[int, int]:
        if site not in self._shapes:
            target = self._sites.target(site)
            with torch.no_grad():
                shape = shapes_of([target], lambda: self._run(self.example(_PROBED)))[site]
            if shape[0] != _PROBED:
                raise InputError(
                    "this module's activation has not one row a sequence, or a place of it",
                    where=site,
                    given=f"{shape} of {_PROBED} sequences",
                )
            self._shapes[site] = shape[1], shape[2]
        return self._shapes[site]

    def capture(
        self, inputs: Any, sites: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos d_in"]]:
        """Activations at the sites, in the model's precision; nothing deeper is computed.

        Raises InputError for an unknown site, or inputs that the model cannot take.
        """
        targets = [self._sites.target(site) for site in sites]
        if not targets:
            return {}
        with torch.no_grad(), multiplied_in(self.products):
            return run_until_captured(targets, lambda: self._run(inputs))

    def documents(self, corpus: CorpusConfig, *, first: int = 0) -> Iterator[Document]:
        """What a corpus holds for this kind of model, numbered from `first`.

        Raises InputError as corpora do.
        """
        return iter(DocumentStream(corpus, first=first))

    @abstractmethod
    def example(self, count: int, positions: int | None = None) -> Any:
        """Inputs of no meaning for so many sequences, of so many positions where one can choose."""

    @abstractmethod
    def _run(self, inputs: Any) -> object:
        """A forward pass."""

    @abstractmethod
    def sequences(
        self,
        documents: Iterable[Document],
        *,
        context: int,
        per_group: int,
        counts: PackingCounts,
        limit: int | None = None,
    ) -> Iterator[Sequences]:
        """Groups of `per_group` sequences of some documents, the last one smaller."""

    @abstractmethod
    def inputs(self, group: Sequences, chosen: NDArray[np.int64]) -> Any:
        """What to run the model on for some sequences of a group."""

    @abstractmethod
    def keep_mask(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Which positions count in statistics and training."""

    @abstractmethod
    def check_rows(self, site: str, rows: str, context: int) -> None:
        """Raise InputError if a site cannot give such rows with so many positions a sequence."""


def grouped(
    entries: Iterable[tuple[Document, str, Any]],
    *,
    context: int,
    per_group: int,
    counts: PackingCounts,
    limit: int | None,
) -> Iterator[Sequences]:
    """Groups of sequences of inputs that are no tokens: (document, hexadecimal digest, input) each.

    `tokens` have 31 bits of the digest at each position: they tell inputs apart.
    """
    left = sys.maxsize if limit is None else limit
    waiting: list[tuple[Document, str, Any]] = []
    last = -1

    def group() -> Sequences:
        nonlocal waiting, left, last
        marks = np.array([int(digest[:8], 16) >> 1 for _, digest, _ in waiting], np.int32)
        ids = np.array([document.id for document, _, _ in waiting], np.int32)
        begun = {d.id: (d.id, d.key, d.title) for d, _, _ in waiting if d.id > last}
        last = int(ids[-1])
        inputs = [each for _, _, each in waiting]
        left, waiting = left - len(waiting), []
        tokens, document = (np.repeat(each[:, None], context, 1) for each in (marks, ids))
        return Sequences(tokens, document, list(begun.values()), inputs)

    counted = -1
    for entry in entries:
        document = entry[0]
        if document.id > counted:
            counts.add(document, 0)
            counted = document.id
        counts.tokens += context
        waiting.append(entry)
        if len(waiting) == min(per_group, left):
            yield group()
        if not left:
            return
    if waiting:
        yield group()


def check_places(site: str, places: int, rows: str, context: int) -> None:
    """Raise InputError unless `context` is the number of rows that a feature map's places give."""
    expected = places if rows == "position" else 1
    if context != expected:
        raise InputError(
            f"{site} has {places} positions, which with rows = {rows} are {expected} of a sequence",
            where="context",
            given=context,
            allowed=str(expected),
        )


def one_device(kind: str, device: str) -> torch.device:
    """The device for a model that is not spread. Raises InputError."""
    if device in SPREAD:
        raise InputError(
            f"a {kind} model is not spread over devices",
            where="model.device",
            given=device,
            allowed="cpu, cuda, cuda:N",
        )
    return device_of(device)


def load_raw_model(
    kind: str,
    spec: str,
    revision: str | None,
    dtype: torch.dtype,
    device: str,
    denoising: DenoisingConfig,
    *,
    trusted: bool = False,
) -> RawModel:
    """Load a model of a kind other than language; its own code only if trusted. InputError."""
    model = _loaded(kind, spec, revision, dtype, one_device(kind, device), denoising, trusted)
    model.code_hash = hash_of_code(model.folder) if trusted else None
    return model


def _loaded(
    kind: str,
    spec: str,
    revision: str | None,
    dtype: torch.dtype,
    place: torch.device,
    denoising: DenoisingConfig,
    trusted: bool,
) -> RawModel:
    if kind == "text_encoder":
        from activations.models.text_encoder import load_text_encoder

        return load_text_encoder(spec, revision, dtype, place, trusted=trusted)
    if kind == "vision":
        from activations.models.vision import load_vision_model

        return load_vision_model(spec, revision, dtype, place, trusted=trusted)
    from activations.models.diffusion import load_diffusion_model

    return load_diffusion_model(spec, revision, dtype, place, denoising, trusted=trusted)
