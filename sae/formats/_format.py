"""What a file format is."""

from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import ClassVar

from sae.architectures import list_architectures
from sae.core.base import SparseAutoencoder, kind_of
from sae.core.plain import Rule
from sae.formats._claim import Claim
from saescope.errors import InputError


class Format(ABC):
    """A layout of files that an SAE can be read from and written to."""

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    """names that an SAE's folder has"""
    further_files: ClassVar[tuple[str, ...]] = ()
    """names that it may have and that are read then"""
    rules: ClassVar[tuple[Rule, ...]] = ()
    """selection rules that it can hold, whatever architecture they are of"""
    holds_transcoders: ClassVar[bool] = False
    """whether it can hold what reconstructs another site than it reads"""
    scales_rows: ClassVar[bool] = False
    """whether it can say that each vector is standardised before it is encoded"""

    def recognise(self, folder: Path) -> bool:
        """Whether a folder holds an SAE of this format; looks at names, and into small files."""
        return all((folder / name).is_file() for name in self.files)

    @abstractmethod
    def read(
        self,
        folder: Path,
        *,
        input_scale: float | None = None,
        released: PurePosixPath | None = None,
    ) -> SparseAutoencoder:
        """The SAE in a folder, for activations in the model's units.

        Args:
            input_scale: what the SAE's inputs were multiplied by in training, where the files do
            not have it folded in; it is folded into the weights.
            released: owner/repository/folder that the files were fetched from; that of a folder
            here is read off its own path (see `released_as`).

        Raises ArtefactError for damaged files, InputError for what saescope cannot represent.
        """

    @abstractmethod
    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Write a folder, atomically; InputError for an SAE that the format cannot hold."""

    def claim(self, folder: Path, sae: SparseAutoencoder) -> Claim | None:
        """The metrics that the files say the SAE has, if they say any."""
        del folder, sae
        return None

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the architectures of ours that it can hold."""
        return tuple(name for name, cls in list_architectures().items() if self._holds(cls))

    def _holds(self, cls: type[SparseAutoencoder]) -> bool:
        of_kind = self.holds_transcoders or not cls.transcodes
        return of_kind and not set(self.rules).isdisjoint(cls.plain_rules)

    def check_writable(self, sae: SparseAutoencoder) -> None:
        """InputError, naming what the format can hold, unless it can hold this architecture."""
        if sae.site_normalisers:
            raise InputError(
                "an SAE of several sites is written one site at a time: sae.at(site)",
                where=self.name,
                given=sorted(sae.site_normalisers),
            )
        if not self._holds(type(sae)):
            raise InputError(
                "cannot hold this architecture",
                where=self.name,
                given=kind_of(sae.config),
                allowed=self.writes,
            )
        if sae.normaliser.kind == "standardised" and not self.scales_rows:
            raise InputError(
                "cannot hold an SAE that standardises each vector",
                where=self.name,
                given=sae.normaliser.kind,
                allowed="a normaliser that folds into the weights",
            )


def released_as(folder: Path, released: PurePosixPath | None = None) -> PurePosixPath:
    """The name that an SAE's folder has in its release, for those that are told by their names.

    Where the hub's cache keeps it, what belongs to the cache is left out. A format may take from
    this only what stands at its end in exactly the released form: the folders above are the
    user's own.

    >>> released_as(Path("/cache/models--me--saes/snapshots/0a1b/layer_3"))
    PurePosixPath('me/saes/layer_3')
    """
    if released is not None:
        return released
    names = folder.absolute().parts
    for at in range(len(names) - 2, 0, -1):
        if names[at] == "snapshots" and names[at - 1].startswith("models--"):
            repository = names[at - 1].split("--")[1:]
            return PurePosixPath(*repository, *names[at + 2 :])
    return PurePosixPath(*names)
