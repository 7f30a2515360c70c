"""Upload an SAE to the Hugging Face hub, with its card."""

import re
import tempfile
from pathlib import Path
from typing import Any

from sae.core.base import SparseAutoencoder
from sae.formats import format_named
from sae.formats.card import model_card
from sae.formats.hub import HubFolder, evaluation_of
from sae.formats.load import load
from saescope.artefact import write_bytes
from saescope.errors import ArtefactError, InputError

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


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
        sae = load(sae)
    metrics = metrics or _at_end_of_training(sae)
    with tempfile.TemporaryDirectory() as holder:
        folder, target = Path(holder) / "sae", HubFolder(repo=repo, folder=path_in_repo or "")
        chosen.write(sae, folder)
        card = model_card(sae, address=str(target), to=to, license=license, metrics=metrics)
        write_bytes(folder / "README.md", card.encode())
        return _send(folder, target, private=private, token=token)


def _send(folder: Path, target: HubFolder, *, private: bool, token: str | None) -> str:
    """Put a folder's files into a repository, made if it is not there; the commit's address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        api.create_repo(target.repo, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=target.repo,
            folder_path=folder,
            path_in_repo=target.folder or None,
            repo_type="model",
            commit_message=f"Upload {target.folder or 'a sparse autoencoder'}",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ArtefactError(f"cannot be uploaded: {first}", where=str(target)) from error
    return str(getattr(commit, "commit_url", commit))


def _at_end_of_training(sae: SparseAutoencoder) -> dict[str, Any] | None:
    last = sae.metadata.get("held_out")
    if not last:
        return None
    facts = {"harvest": sae.metadata.get("harvest_hash"), "site": sae.metadata.get("site")}
    protocol = {"split": "held_out", "measured": "as the training ended", "rows": last.get("rows")}
    return {"protocol": {**facts, **protocol}, "reconstruction": last}
