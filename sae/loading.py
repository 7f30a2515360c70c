"""Load an SAE from its folder or from a run's."""

from pathlib import Path

from sae.architectures import architectures
from sae.base import CONFIG_FILE, SparseAutoencoder, read_sae
from saescope.artefact import MANIFEST
from saescope.errors import ArtefactError

SAE_FOLDER = "sae"


def load(path: str | Path) -> SparseAutoencoder:
    """The SAE in a run's folder or in an SAE's own, in evaluation mode, on the CPU.

    Raises ArtefactError if there is none, if the run is not finished, or if the files are damaged
    or of a newer version.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).exists():
        return read_sae(folder, architectures())
    if (folder / SAE_FOLDER / CONFIG_FILE).exists():
        return read_sae(folder / SAE_FOLDER, architectures())
    if (folder / MANIFEST).exists():
        raise ArtefactError("this run is not finished; train it to the end", where=str(folder))
    raise ArtefactError("no SAE here", where=str(folder))
