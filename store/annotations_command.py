"""`saescope annotations`: labels, notes, tags, lists and votes to a file, and from one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from saescope.artefact import atomic_path
from saescope.config import Config
from saescope.errors import InputError
from saescope.paths import local
from saescope.progress import say
from saescope.replacing import PLAIN_FILE
from saescope.system import system_errors
from store.annotation_exchange import CONFLICTS, as_csv, as_json, entries, merge, read_entries
from store.annotations import Annotations
from store.feature_store import FeatureStore

FORMATS = (".json", ".csv")
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class AnnotationsConfig(Config):
    """Export or import the annotations of a store."""

    SPELLED: ClassVar[Mapping[str, str]] = {"import": "import_from", "export": "export_to"}

    store: str
    """A store's file or folder."""
    export_to: str | None = None
    """File to write: .json (everything, with the history) or .csv. Also spelled --export."""
    import_from: str | None = None
    """File to read: .json or .csv, as --export writes them. Also spelled --import."""
    conflicts: str = "refuse"
    """Where a text is different here and in the file: refuse (change nothing at all), keep (what is
    here) or replace (it by the file's)."""
    who: str | None = None
    """Name that the changes are recorded under; the system's user if not given."""
    other_sae: bool = False
    """Import annotations that were made about another SAE."""
    replace: bool = False
    """Write over a file that is there."""

    def __post_init__(self) -> None:
        if self.conflicts not in CONFLICTS:
            raise InputError(
                "no such rule", where="conflicts", given=self.conflicts, allowed=CONFLICTS
            )


@system_errors()
def annotations(config: AnnotationsConfig) -> None:
    """Export, or import and report what changed.

    Raises InputError for a file that is none of annotations, and for conflicts that are to be
    refused: then nothing is changed. ArtefactError where annotations cannot be read or saved.
    """
    if (config.export_to is None) == (config.import_from is None):
        raise InputError("give --export FILE or --import FILE", where="annotations")
    file = local(config.export_to or config.import_from or "")
    if file.suffix not in FORMATS:
        raise InputError("no such kind of file", where="file", given=str(file), allowed=FORMATS)
    with FeatureStore.open(config.store) as store:
        path, sae_hash, d_sae = store.path, str(store.meta.get("sae_hash") or ""), store.d_sae
    with Annotations.open(path, sae_hash=sae_hash, who=config.who) as notes:
        if config.export_to is not None:
            _export(file, notes, sae_hash, replace=config.replace)
            return
        given = read_entries(file, d_sae=d_sae, sae_hash="" if config.other_sae else sae_hash)
        report = merge(notes, given, config.conflicts)
    for line in report.conflicts[:_SHOWN]:
        say(line)
    if len(report.conflicts) > _SHOWN:
        say(f"and {len(report.conflicts) - _SHOWN:,} more")
    if report.conflicts and config.conflicts == "refuse":
        raise InputError(
            f"{len(report.conflicts):,} texts are different here, so nothing was changed; "
            "--conflicts keep or replace decides",
            where=str(file),
        )
    say(
        f"{notes.path}: {report.added:,} added, {report.replaced:,} replaced, "
        f"{len(report.conflicts):,} left as they were here"
    )


def _export(out: Path, notes: Annotations, sae_hash: str, *, replace: bool) -> None:
    text = as_csv(notes) if out.suffix == ".csv" else as_json(notes, sae_hash)
    with atomic_path(out, PLAIN_FILE, replace=replace) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
    say(f"{out}: annotations of {len(entries(notes)):,} features")
