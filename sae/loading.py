"""Load an SAE: our folder, a run's, any known format's, here or on the Hugging Face hub."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sae.base import SparseAutoencoder
from sae.formats import Format, format_named, recognise
from sae.formats._claim import Claim
from sae.formats.hub import SCHEME, HubFolder, fetch
from saescope.artefact import MANIFEST
from saescope.errors import ArtefactError, InputError

if TYPE_CHECKING:
    from activations import Model

SAE_FOLDER = "sae"


def load(
    path: str | Path,
    *,
    reference: Tensor | None = None,
    target: Tensor | None = None,
    claimed: Claim | Mapping[str, Any] | None = None,
    model: "Model | None" = None,
    tokens: Tensor | None = None,
    input_scale: float | None = None,
) -> SparseAutoencoder:
    """The SAE in a folder, in evaluation mode, on the CPU.

    The folder is an SAE's own, a run's, or one that SAELens, Gemma Scope, sparsify or
    dictionary_learning wrote; hf://owner/repo[/folder][@revision] names one on the hub.

    Args:
        reference: activations [rows, d_in] of the site, in the model's units, some thousands. L0
            and FVU are measured on them and compared with what is claimed (`sae.certificate` has
            the tolerances); the certificate is put into the SAE's metadata.
        target: what a transcoder is to predict, [rows, d_out].
        claimed: l0, fvu, ce_recovered, beside or instead of those that the files state.
        model, tokens: to measure the cross-entropy recovered too, on sequences int64 [n, position].
        input_scale: what inputs were multiplied by in training, where the files lost it.

    Raises ArtefactError if there is none, if a run is not finished, if files are damaged or of a
    newer version, or if the measurements are not in line (it says what looks wrong); InputError
    for an SAE that saescope cannot represent.

    >>> load("hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")  # doctest: +SKIP
    """
    if reference is None and (claimed is not None or model is not None or target is not None):
        raise InputError("needs reference activations", where="load", given="no reference")
    name = str(path)
    place = HubFolder.parse(name) if name.startswith(SCHEME) else None
    here, commit = fetch(place) if place else (Path(path), None)
    folder, found = find(here, name)
    sae = found.read(folder, input_scale=input_scale).eval()
    stated = found.claim(folder, sae)
    if place:
        sae.metadata["source"] = str(replace(place, revision=commit or place.revision))
    if found.name != "saescope" and stated is not None:
        sae.metadata["claimed"] = stated.stated()
    if reference is not None:
        from sae.certificate import certify

        claim = stated if claimed is None else Claim.of(claimed).merge(stated)
        certificate = certify(
            sae, reference, claimed=claim, target=target, model=model, tokens=tokens, where=name
        )
        sae.metadata["certificate"] = certificate.as_dict()
    return sae


def find(folder: Path, name: str) -> tuple[Path, Format]:
    """The folder with the SAE's files, and their format.

    Raises ArtefactError if there is none, or if it is a run that is not finished.
    """
    own = format_named("saescope")
    for place in (folder, folder / SAE_FOLDER):
        if own.recognise(place):
            return place, own
    if (folder / MANIFEST).exists():
        raise ArtefactError("this run is not finished; train it to the end", where=name)
    if not folder.is_dir():
        raise ArtefactError("no SAE here", where=name)
    return folder, recognise(folder)
