"""Load an SAE: our folder, a run's, any known format's; here, in a bucket or on the hub."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.core.soundness import check_sound
from sae.data.model_expectations import warn_at_load
from sae.formats import Format, format_named, recognise
from sae.formats._claim import Claim
from sae.formats._ours import sae_of
from sae.formats.hub import SCHEME, HubFolder, fetch
from sae.formats.remote import copied
from saescope.artefact import MANIFEST
from saescope.errors import ArtefactError, InputError
from saescope.paths import AnyPath, as_path
from saescope.system import system_errors

if TYPE_CHECKING:
    from activations import Model

SAE_FOLDER = "sae"


@system_errors()
def load(
    path: str | AnyPath,
    *,
    reference: Tensor | None = None,
    target: Tensor | None = None,
    claimed: Claim | Mapping[str, Any] | None = None,
    model: "Model | None" = None,
    tokens: Tensor | None = None,
    input_scale: float | None = None,
    site: str | None = None,
    target_site: str | None = None,
) -> SparseAutoencoder:
    """The SAE in a folder, in evaluation mode, on the CPU.

    The folder is an SAE's own, a run's, or one that SAELens, Gemma Scope, sparsify or
    dictionary_learning wrote. A URL such as s3://bucket/name names one in an object store;
    hf://owner/repo[/folder][@revision] one on the Hugging Face hub.

    Args:
        reference: activations [rows, d_in] of the site, in the model's units, some thousands. L0
            and FVU are measured on them and compared with what is claimed
            (`sae.formats.certificate` has the tolerances); the certificate is put into the SAE's
            metadata.
        target: what a transcoder is to predict, [rows, d_out].
        claimed: l0, fvu, ce_recovered, beside or instead of those that the files state.
        model, tokens: to measure the cross-entropy recovered too, on sequences int64 [n, position].
        input_scale: what inputs were multiplied by in training, where the files lost it.
        site, target_site: of an SAE of someone else's, where it reads, and where a transcoder
        writes, if its files do not say, or name what the model has not. Given a target_site, an SAE
        whose files do not say what it is becomes a transcoder. SAEs of saescope know their sites;
        of several layers, site says at which it is wanted.

    What the files say of the model that an SAE is for, and saescope's models are not, is a warning.

    Raises ArtefactError if there is none, if a run is not finished, if files are damaged or of a
    newer version, or if the measurements are not in line (it says what looks wrong); InputError
    for an SAE that saescope cannot represent.

    >>> load("hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")  # doctest: +SKIP
    """
    if reference is None and (claimed is not None or model is not None or target is not None):
        raise InputError("needs reference activations", where="load", given="no reference")
    name = str(path)
    sae, stated = _read(name, input_scale=input_scale, site=site, target_site=target_site)
    if reference is not None:
        from sae.formats.certificate import certify

        claim = stated if claimed is None else Claim.of(claimed).merge(stated)
        certificate = certify(
            sae, reference, claimed=claim, target=target, model=model, tokens=tokens, where=name
        )
        sae.metadata["certificate"] = certificate.as_dict()
    return sae


def _read(
    name: str, *, input_scale: float | None, site: str | None, target_site: str | None
) -> tuple[SparseAutoencoder, Claim | None]:
    """The SAE at a path or on the hub, nothing measured, and what its files claim."""
    hub = HubFolder.parse(name) if name.startswith(SCHEME) else None
    with ExitStack() as stack:
        try:
            here, commit = fetch(hub) if hub else (as_path(name), None)
            if not isinstance(here, Path):
                here = stack.enter_context(copied(here, SAE_FOLDER))
            folder, found = find(here, name)
        except (OSError, ValueError) as error:  # names that no file can have
            if isinstance(error, InputError):
                raise
            raise ArtefactError(f"no SAE here: {error}", where=name[:200]) from error
        return _of_format(found, folder, name, hub, commit, input_scale, site, target_site)


def _of_format(
    found: Format,
    folder: Path,
    name: str,
    hub: HubFolder | None,
    commit: str | None,
    input_scale: float | None,
    site: str | None,
    target_site: str | None,
) -> tuple[SparseAutoencoder, Claim | None]:
    """The SAE in a folder of a format, checked, and what its files claim."""
    released = PurePosixPath(hub.repo, hub.folder) if hub else None
    sae = found.read(folder, input_scale=input_scale, released=released).eval()
    sae = named_sites(sae, site, target_site)
    warn_at_load(sae)
    check_sound(sae, where=name)
    stated = found.claim(folder, sae)
    if hub:
        sae.metadata["source"] = str(replace(hub, revision=commit or hub.revision))
    if found.name != "saescope" and stated is not None:
        sae.metadata["claimed"] = stated.stated()
    return sae, stated


def find(folder: Path, name: str) -> tuple[Path, Format]:
    """The folder with the SAE's files, and their format.

    Raises ArtefactError if there is none, or if it is a run that is not finished.
    """
    own = format_named("saescope")
    for candidate in (folder, folder / SAE_FOLDER):
        if own.recognise(candidate):
            return candidate, own
    if (folder / MANIFEST).exists():
        raise ArtefactError("this run is not finished; train it to the end", where=name)
    if not folder.is_dir():
        raise ArtefactError("no SAE here", where=name)
    return folder, recognise(folder)


def named_sites(
    sae: SparseAutoencoder, site: str | None, target_site: str | None
) -> SparseAutoencoder:
    """A foreign SAE at sites that its user names; made a transcoder by a target_site.

    Raises InputError for an SAE that knows what it is and where.
    """
    unstated = sae.metadata.pop("kind_unstated", False)
    if site is None and target_site is None:
        return sae
    from activations.sites.names import full_name

    if sae.site_normalisers and site is not None and target_site is None:
        return sae.at(full_name(site))
    given = {"site": site, "target_site": target_site}
    names = {name: full_name(value) for name, value in given.items() if value is not None}
    if target_site is not None and not sae.transcodes:
        if not unstated:
            raise InputError(
                "this SAE is no transcoder: it writes where it reads",
                where="target_site",
                given=target_site,
            )
        metadata = sae.metadata
        sae = sae_of(replace(sae.plain(), transcoder=True)).eval()
        sae.metadata = metadata
    for name, value in names.items():
        if not sae.metadata.get("format") and sae.metadata.get(name) != value:
            raise InputError(
                "this SAE has sites of its own",
                where=name,
                given=value,
                allowed=str(sae.metadata.get(name)),
            )
        sae.metadata[name] = value
    return sae
