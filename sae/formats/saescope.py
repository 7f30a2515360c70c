"""Our own format: config.json and weights.safetensors (see `sae.core.serialisation`)."""

from pathlib import Path, PurePosixPath
from typing import ClassVar

import torch

from sae.architectures import HOW_TO_NAME, list_architectures
from sae.core.base import SparseAutoencoder
from sae.core.normaliser import Normaliser
from sae.core.serialisation import CONFIG_FILE, WEIGHTS_FILE, damage_named, read_saved
from sae.formats import register
from sae.formats._claim import Claim
from sae.formats._format import Format
from saescope.artefact import read_json
from saescope.config import from_dict
from saescope.errors import ArtefactError, InputError


@register
class SaescopeFormat(Format):
    """Every architecture, to the bit."""

    name: ClassVar[str] = "saescope"
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE)
    scales_rows: ClassVar[bool] = True

    def _holds(self, cls: type[SparseAutoencoder]) -> bool:
        del cls
        return True

    def recognise(self, folder: Path) -> bool:
        """A config.json that says it is an SAE's, or that has its weights beside it."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            return False
        if (folder / WEIGHTS_FILE).is_file():
            return True
        try:
            described = read_json(path)
        except ArtefactError:
            return False
        return isinstance(described, dict) and described.get("kind") == "sae"

    @torch.no_grad()
    def read(
        self,
        folder: Path,
        *,
        input_scale: float | None = None,
        released: PurePosixPath | None = None,
    ) -> SparseAutoencoder:
        """The SAE as it was saved."""
        del released
        sae = _read(folder)
        if input_scale is None:
            return sae
        if not sae.normaliser.is_identity:
            raise InputError(
                "has its own scale already", where="input_scale", given=sae.normaliser.kind
            )
        scale = torch.tensor(input_scale, dtype=torch.float32)
        variance = sae.normaliser.variance
        sae.normaliser = Normaliser("sqrt_d", torch.zeros(sae.d_in), scale, variance)
        return sae.fold()

    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Everything, its normaliser unfolded."""
        sae.save(folder)

    def claim(self, folder: Path, sae: SparseAutoencoder) -> Claim | None:
        """What it measured at the end of its training, or what it was converted with."""
        measured = sae.metadata.get("held_out") or sae.metadata.get("claimed")
        return Claim.from_metrics(measured, f"its {CONFIG_FILE}")


def _read(folder: Path) -> SparseAutoencoder:
    """The SAE in a folder, in evaluation mode.

    Raises ArtefactError if files are missing, damaged, of a newer schema or of an architecture
    that is not known here.
    """
    saved, known, path = read_saved(folder), list_architectures(), folder / CONFIG_FILE
    if saved.architecture not in known:
        named = HOW_TO_NAME.replace("my.module", saved.defined_in or "my.module")
        raise ArtefactError(
            f"unknown architecture; name the module that defines it: {named}",
            where=str(path),
            given=saved.architecture,
            allowed=known,
        )
    cls = known[saved.architecture]
    with damage_named(folder):
        config = from_dict(cls.Config, saved.config, where=str(path))
        saved.check_sizes(config.d_sae, folder)
        sae = cls(config, saved.d_in, saved.d_out)
        sae.normalisers, sae.metadata = saved.normalisers, saved.metadata
        saved.check_types(sae.state_dict(), folder)
        sae.load_state_dict(saved.tensors)
    return sae.eval()
