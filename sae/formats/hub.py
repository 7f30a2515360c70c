"""SAEs on the Hugging Face hub: fetch a folder of a repository, upload one with its card."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sae.core.base import SparseAutoencoder
from sae.evaluation.written import EVALUATION_FILE, read_evaluation
from sae.formats import format_named, formats
from sae.formats.card import model_card
from saescope.artefact import write_bytes
from saescope.errors import ArtefactError, InputError
from saescope.paths import local

SCHEME = "hf://"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"(refs/(?:pr|convert)/[^/]+|[^/]+)(?:/(.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """A folder of a repository on the hub.

    >>> HubFolder.parse("hf://me/saes/layer_3/topk@v1")
    HubFolder(repo='me/saes', folder='layer_3/topk', revision='v1')
    """

    repo: str
    """owner/name"""
    folder: str
    """inside the repository, "" for its top"""
    revision: str | None = None
    """branch, tag or commit; the default branch if None"""

    @classmethod
    def parse(cls, name: str) -> "HubFolder":
        """From hf://owner/repo[/folder][@revision], or hf://owner/repo@revision/folder.

        Raises InputError for another form.
        """
        before, at, after = name.removeprefix(SCHEME).partition("@")
        parts = [part for part in before.split("/") if part]
        revision = _REVISION.fullmatch(after) if at else None
        if len(parts) < 2 or (at and revision is None) or ".." in parts:
            raise InputError(
                "not a folder on the hub",
                where="hub",
                given=name,
                allowed="hf://owner/repo[/folder][@revision]",
            )
        folder = parts[2:]
        if revision and revision[2]:
            folder = [*folder, *(part for part in revision[2].split("/") if part)]
        return cls(
            repo="/".join(parts[:2]),
            folder="/".join(folder),
            revision=revision[1] if revision else None,
        )

    @property
    def file_name(self) -> str:
        """A name for what is measured of it here.

        >>> HubFolder.parse("hf://me/saes/layer_3@v1").file_name
        'me--saes--layer_3@v1'
        """
        return str(self).removeprefix(SCHEME).replace("/", "--")

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return SCHEME + "/".join(part for part in (self.repo, self.folder) if part) + at


def fetch(place: HubFolder) -> tuple[Path, str | None]:
    """A local copy of the files of a folder that some format reads, and the commit it is of.

    Raises ArtefactError, with the hub's own words, if they cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    names = sorted({n for each in formats().values() for n in (*each.files, *each.further_files)})
    patterns = [str(PurePosixPath(place.folder) / name) for name in names]
    try:
        snapshot = snapshot_download(place.repo, revision=place.revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtefactError(f"cannot be fetched: {first}", where=str(place)) from error
    commit = Path(snapshot).name  # the hub's cache has one folder a commit
    return Path(snapshot) / place.folder, commit if _COMMIT.fullmatch(commit) else None


def upload(
    sae: SparseAutoencoder | str | Path,
    repo: str,
    *,
    to: str = "saescope",
    path_in_repo: str | None = None,
    private: bool = False,
    license: str | None = None,
    metrics: dict[str, Any] | None = None,
    token: str | None = None,
) -> str:
    """Upload an SAE with a model card that states what it measures; the commit's address.

    Args:
        sae: an SAE, or anything `sae.load` reads.
        repo: owner/name on the Hugging Face hub, made if it is not there.
        to: the format to upload in (see `sae.formats.formats`).
        path_in_repo: folder inside the repository; its top if not given.
        private: whether a repository that is made is private.
        license: as the hub names it; left open if not given.
        metrics: what `saescope eval` returned; if not given, the run's evaluation.json, or what
            was measured on held-out rows as the training ended.
        token: of the hub; the one that is logged in if not given.

    Raises InputError for a repository's name or an SAE that cannot be, ArtefactError if the hub
    refuses.

    >>> upload("runs/smollm2-135m-topk", "me/smollm2-saes")  # doctest: +SKIP
    'https://huggingface.co/me/smollm2-saes/commit/...'
    """
    if not _REPO.fullmatch(repo):
        raise InputError("not a repository", where="upload", given=repo, allowed="owner/name")
    chosen = format_named(to)
    if not isinstance(sae, SparseAutoencoder):
        metrics = metrics or evaluation_of(sae)
        from sae.formats.load import load  # it imports this module

        sae = load(sae)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder) / "sae"
        chosen.write(sae, folder)
        place = HubFolder(repo=repo, folder=path_in_repo or "")
        metrics = metrics or _at_end_of_training(sae)
        card = model_card(sae, place=str(place), to=to, license=license, metrics=metrics)
        write_bytes(folder / "README.md", card.encode())
        api = HfApi(token=token)
        try:
            api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                path_in_repo=path_in_repo,
                repo_type="model",
                commit_message=f"Upload {path_in_repo or 'a sparse autoencoder'}",
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise ArtefactError(f"cannot be uploaded: {first}", where=str(place)) from error
    return str(getattr(commit, "commit_url", commit))


def _at_end_of_training(sae: SparseAutoencoder) -> dict[str, Any] | None:
    last = sae.metadata.get("held_out")
    if not last:
        return None
    facts = {"harvest": sae.metadata.get("harvest_hash"), "site": sae.metadata.get("site")}
    protocol = {"split": "held_out", "measured": "as the training ended", "rows": last.get("rows")}
    return {"protocol": {**facts, **protocol}, "reconstruction": last}


def evaluation_file(source: str | Path) -> Path:
    """Where `saescope eval` writes: into an SAE's or a run's folder; of one on the hub, here."""
    name = str(source)
    if name.startswith(SCHEME):
        return Path(f"{HubFolder.parse(name).file_name}.{EVALUATION_FILE}")
    return local(name) / EVALUATION_FILE


def evaluation_of(source: str | Path) -> dict[str, Any] | None:
    """What `saescope eval` wrote beside an SAE or a run; None where it did not."""
    path = evaluation_file(source)
    return read_evaluation(path) if path.is_file() else None
