"""Models of any kind but language: their sites are their modules."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from activations.models.base import HarvestModel
from activations.models.matmul_precision import multiplied_in
from activations.sites.grids import GridRun
from activations.sites.hooks import PositionedEdit, run_until_captured, shapes_of, splicing
from activations.sites.modules import ModuleSites
from saescope.errors import InputError

_PROBED = 3


class ModuleModel(HarvestModel):
    """A model whose sites are its modules, of any kind but language.

    >>> encoder = load_model("minilm", kind="text_encoder")  # doctest: +SKIP
    >>> encoder.resolve("module:encoder.layer.*:output")[:1]  # doctest: +SKIP
    ['module:encoder.layer.0:output']
    """

    def __init__(
        self, module: nn.Module, *, spec: str, folder: Path, revision: str | None = None
    ) -> None:
        frozen = module.requires_grad_(requires_grad=False).eval()
        super().__init__(frozen, spec=spec, folder=folder, revision=revision)
        self._sites = ModuleSites(module, spec)
        self._shapes: dict[str, tuple[int, int]] = {}

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
        """What a harvest's manifest says of the model; `inputs_hash` stands for a tokenizer's."""
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
                    "this module's activation is not [sequence, (position,) d_in]",
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

    @abstractmethod
    def _run(self, inputs: Any) -> object:
        """A forward pass."""

    def _grid_run(self) -> GridRun:
        """What tells where a site's positions stand in pictures; InputError if there are none."""
        raise InputError(
            "only models of language and of pictures can be edited",
            where="edit",
            given=self.kind,
        )

    @contextmanager
    def edit_with_positions(self, edits: Mapping[str, PositionedEdit]) -> Iterator[None]:
        """Splice: while the context lasts, replace the activation at each site.

        Each function gets the activation [batch, position, d_in] and its `GridPositions`, and
        returns the replacement of the same shape, or None to leave the very tensor alone.

        Raises InputError for an unknown site, a replacement of another shape, and a text encoder.
        """
        targets = [(self._sites.target(site), function) for site, function in edits.items()]
        with splicing(self.module, targets, self._grid_run()):
            yield

    def check_rows(self, sites: Sequence[str], rows: str, context: int) -> None:
        """See `HarvestModel`; a kind says what it wants of each site."""
        for site in sites:
            self._check_site(site, rows, context)

    @abstractmethod
    def _check_site(self, site: str, rows: str, context: int) -> None: ...


def check_positions(site: str, positions: int, rows: str, context: int) -> None:
    """Raise InputError unless `context` is the number of rows that so many positions give."""
    expected = positions if rows == "position" else 1
    if context != expected:
        raise InputError(
            f"{site} has {positions} positions, which with rows = {rows} are {expected} of a "
            "sequence",
            where="context",
            given=context,
            allowed=str(expected),
        )
