"""`saescope convert`: an SAE from one format to another, certified on the way, or to the hub."""

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from sae.core.base import SparseAutoencoder, kind_of
from sae.formats import format_named, formats
from sae.formats._claim import Claim
from sae.formats.certificate import Measured, certify
from sae.formats.hub import evaluation_of
from sae.formats.load import load, named_sites
from sae.formats.upload import upload
from saescope.artefact import atomic_path
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.paths import if_local, local
from saescope.progress import say
from saescope.replacing import Kind, check_apart, check_replaceable, only_files, same_content
from saescope.system import system_errors


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Config):
    """Convert an SAE between formats, or upload it."""

    source: str
    """Folder of an SAE or a run, in any known format, or hf://owner/repo/folder[@revision]."""
    to: str = "saescope"
    """Format to write: saescope, saelens, gemma_scope, sparsify, dictionary_learning, or, of a
    cross-layer transcoder, circuit_tracer."""
    out: str | None = None
    """Folder to write."""
    replace: bool = False
    """Replace another SAE that is in `out`. One with the very bytes that are to be written is
    replaced without this, and what is no SAE never."""
    upload: str | None = None
    """Repository on the Hugging Face hub to upload to, owner/name, with a model card."""
    path_in_repo: str | None = None
    """Folder inside that repository; its top if not given."""
    private: bool = False
    """Whether a repository that has to be made is private."""
    license: str | None = None
    """License of the uploaded SAE, as the hub names it."""
    site: str | None = None
    """Of an SAE of several layers, the one to convert; of someone else's SAE, where it reads, if
    its files do not say."""
    target_site: str | None = None
    """Where someone else's transcoder writes, if its files do not say."""
    harvest: str | None = None
    """Harvest of the SAE's site; if given, L0 and FVU are checked on it before anything is
    written."""
    rows: int = 4096
    """Rows of the harvest to check on."""
    claimed_l0: float | None = None
    """L0 that the SAE is said to have, where its files do not say."""
    claimed_fvu: float | None = None
    """Fraction of variance unexplained that it is said to have."""
    input_scale: float | None = None
    """What inputs were multiplied by in training, where the files lost it."""

    def __post_init__(self) -> None:
        if self.to not in formats():
            raise InputError("no such format", where="to", given=self.to, allowed=formats())
        check_range("rows", self.rows, low=2)
        if self.input_scale is not None:
            check_range("input_scale", self.input_scale, above=0)


def _is_export(folder: Path) -> bool:
    return any(
        each.recognise(folder) and only_files(folder, each.files, each.further_files)
        for each in formats().values()
    )


EXPORT = Kind("an SAE", _is_export)


@system_errors()
def convert(config: ConvertConfig) -> SparseAutoencoder:
    """Read, check, write; the SAE as it was read.

    Raises InputError for what a format cannot hold, and if something is where the folder is to be
    that may not be replaced; ArtefactError for files that are damaged or
    that do not measure what they claim.
    """
    if not config.out and not config.upload:
        raise InputError("give --out, --upload or both", where="convert")
    if config.out:
        out = local(config.out)
        check_replaceable(out, EXPORT, replace=True)
        check_apart(out, *(if_local(each) for each in (config.source, config.harvest) if each))
    claims = {"l0": config.claimed_l0, "fvu": config.claimed_fvu}
    claimed = {name: value for name, value in claims.items() if value is not None}
    if claimed and config.harvest is None:
        raise InputError("claims are checked on a harvest; give --harvest", where="harvest")
    sae = load(config.source, input_scale=config.input_scale, target_site=config.target_site)
    if config.site:
        sae = sae.at(config.site) if sae.site_normalisers else named_sites(sae, config.site, None)
    said = f"{kind_of(sae.config)}, d_in {sae.d_in}, d_sae {sae.d_sae}"
    if config.harvest:
        measured = _check(sae, config, claimed)
        said += f"; on {measured.rows:,} rows {measured.text()}"
    if config.out:
        _write(sae, config)
        say(f"{config.out}: {said} ({config.to})")
    if config.upload:
        address = upload(
            sae,
            config.upload,
            metrics=evaluation_of(config.source),
            to=config.to,
            path_in_repo=config.path_in_repo,
            private=config.private,
            license=config.license,
        )
        say(f"{address}: {said} ({config.to})")
    return sae


def _write(sae: SparseAutoencoder, config: ConvertConfig) -> None:
    """Write the folder; what is there is replaced if that is asked for, or loses nothing."""
    out = local(config.out or "")
    replace = config.replace or (EXPORT.holds(out) and _gives_again(sae, out))
    with system_errors(out), atomic_path(out, EXPORT, replace=replace) as temporary:
        format_named(config.to).write(sae, temporary)


def _gives_again(sae: SparseAutoencoder, folder: Path) -> bool:
    """Whether writing an SAE in the format of what is in a folder gives the same to the byte."""
    for each in formats().values():
        if each.recognise(folder):
            with tempfile.TemporaryDirectory() as holder:
                again = Path(holder) / folder.name
                with suppress(InputError):  # an SAE that this format cannot hold
                    each.write(sae, again)
                    return same_content(again, folder)
    return False


def _check(sae: SparseAutoencoder, config: ConvertConfig, claimed: dict[str, float]) -> Measured:
    """Certify on held-out rows of the harvest, against the files' claims and the user's."""
    from sae.data.harvests import open_harvest, split_pieces

    harvest, placement = open_harvest(sae, config.harvest, config.site)
    pieces = list(split_pieces(harvest, placement, "held_out", config.rows)())
    if not pieces:
        raise InputError("has no held-out rows to check on", where=str(config.harvest))
    x = torch.cat([each.x for each in pieces])
    target = None
    if placement.read != placement.written:
        target = torch.cat([each.target for each in pieces])
    stated = sae.metadata.get("held_out") or sae.metadata.get("claimed")
    certificate = certify(
        sae,
        x,
        claimed=Claim.of(claimed).merge(Claim.from_metrics(stated, "its files")),
        target=target,
        where=config.source,
    )
    sae.metadata["certificate"] = certificate.as_dict()
    return certificate.measured
