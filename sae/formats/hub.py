"""SAEs on the Hugging Face hub: names of folders of repositories, and their files fetched."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sae.evaluation.written import EVALUATION_FILE, read_evaluation
from sae.formats import formats
from saescope.errors import ArtefactError, InputError
from saescope.paths import AnyPath, as_path, exists

SCHEME = "hf://"
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
        names = [each for each in before.split("/") if each]
        revision = _REVISION.fullmatch(after) if at else None
        if len(names) < 2 or (at and revision is None) or ".." in names:
            raise InputError(
                "not a folder on the hub",
                where="hub",
                given=name,
                allowed="hf://owner/repo[/folder][@revision]",
            )
        folder = names[2:]
        if revision and revision[2]:
            folder = [*folder, *(each for each in revision[2].split("/") if each)]
        return cls(
            repo="/".join(names[:2]),
            folder="/".join(folder),
            revision=revision[1] if revision else None,
        )

    @property
    def is_commit(self) -> bool:
        """Whether its revision is a commit, whose files never change."""
        return self.revision is not None and bool(_COMMIT.fullmatch(self.revision))

    @property
    def file_name(self) -> str:
        """A name for what is measured of it here.

        >>> HubFolder.parse("hf://me/saes/layer_3@v1").file_name
        'me--saes--layer_3@v1'
        """
        return str(self).removeprefix(SCHEME).replace("/", "--")

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return SCHEME + "/".join(each for each in (self.repo, self.folder) if each) + at


def fetch(wanted: HubFolder) -> tuple[Path, str | None]:
    """A local copy of the files of a folder that some format reads, and the commit it is of.

    Raises ArtefactError, with the hub's own words, if they cannot be had.
    """
    names = sorted({n for each in formats().values() for n in (*each.files, *each.further_files)})
    return fetched(wanted, names)


def fetched(wanted: HubFolder, names: Iterable[str]) -> tuple[Path, str | None]:
    """A local copy of the files of a folder with these names or patterns, and their commit.

    Raises ArtefactError, with the hub's own words, if they cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [str(PurePosixPath(wanted.folder) / name) for name in names]
    try:
        snapshot = snapshot_download(wanted.repo, revision=wanted.revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtefactError(f"cannot be fetched: {first}", where=str(wanted)) from error
    commit = Path(snapshot).name  # the hub's cache has one folder a commit
    return Path(snapshot) / wanted.folder, commit if _COMMIT.fullmatch(commit) else None


def evaluation_file(source: str | AnyPath) -> AnyPath:
    """Where `saescope eval` writes: into an SAE's or a run's folder; of one on the hub, here."""
    name = str(source)
    if name.startswith(SCHEME):
        return Path(f"{HubFolder.parse(name).file_name}.{EVALUATION_FILE}")
    return as_path(name) / EVALUATION_FILE


def evaluation_of(source: str | AnyPath) -> dict[str, Any] | None:
    """What `saescope eval` wrote beside an SAE or a run; None where it did not."""
    path = evaluation_file(source)
    return read_evaluation(path) if exists(path) else None
