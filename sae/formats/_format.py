"""What a file format is."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from sae.base import SparseAutoencoder, kind_of
from sae.formats._claim import Claim
from saescope.errors import InputError


class Format(ABC):
    """A layout of files that an SAE can be read from and written to."""

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    """names that an SAE's folder has"""
    further_files: ClassVar[tuple[str, ...]] = ()
    """names that it may have and that are read then"""
    writes: ClassVar[tuple[str, ...]]
    """architectures of ours that it can hold"""
    scales_rows: ClassVar[bool] = False
    """whether it can say that each vector is standardised before it is encoded"""

    def recognise(self, folder: Path) -> bool:
        """Whether a folder holds an SAE of this format; looks at names, and into small files."""
        return all((folder / name).is_file() for name in self.files)

    @abstractmethod
    def read(self, folder: Path, *, input_scale: float | None = None) -> SparseAutoencoder:
        """The SAE in a folder, for activations in the model's units.

        Args: input_scale is what the SAE's inputs were multiplied by in training, where the files
        do not have it folded in; it is folded into the weights.
        Raises ArtefactError for damaged files, InputError for what saescope cannot represent.
        """

    @abstractmethod
    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Write a folder, atomically; InputError for an SAE that the format cannot hold."""

    def claim(self, folder: Path, sae: SparseAutoencoder) -> Claim | None:
        """The metrics that the files say the SAE has, if they say any."""
        del folder, sae
        return None

    def check_writable(self, sae: SparseAutoencoder) -> None:
        """InputError, naming what the format can hold, unless it can hold this architecture."""
        if sae.site_normalisers:
            raise InputError(
                "an SAE of several sites is written one site at a time: sae.at(site)",
                where=self.name, given=sorted(sae.site_normalisers),
            )  # fmt: skip
        if kind_of(sae.config) not in self.writes:
            raise InputError(
                "cannot hold this architecture", where=self.name, given=kind_of(sae.config),
                allowed=self.writes,
            )  # fmt: skip
        if sae.normaliser.kind == "standardised" and not self.scales_rows:
            raise InputError(
                "cannot hold an SAE that standardises each vector", where=self.name,
                given=sae.normaliser.kind, allowed="a normaliser that folds into the weights",
            )  # fmt: skip
