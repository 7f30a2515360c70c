"""`saescope init`: write the example configurations into a folder, to run and to change."""

import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from saescope.config import Config
from saescope.errors import ArtefactError, InputError
from saescope.examples import FOLDER, examples
from saescope.progress import say
from saescope.system import system_errors


@dataclass(frozen=True, kw_only=True)
class InitConfig(Config):
    """Write the example configurations into a folder."""

    folder: str = "."
    """Folder to write configs/ into; it is made if it is not there."""


def init(config: InitConfig) -> list[Path]:
    """Write all examples, or, if one of them is there already, none; the files written.

    Raises InputError if a file is in the way, ArtefactError if the folder cannot be written.
    """
    folder = Path(config.folder).expanduser()
    targets = {folder / name: source for name, source in examples().items()}
    if not targets:
        raise ArtefactError("the example configurations are missing; install saescope again")
    with system_errors(folder):
        there = [str(path.relative_to(folder)) for path in targets if path.exists()]
        if there:
            raise InputError(
                f"nothing is written, since these are there already: {', '.join(there)}. Move them "
                "away, or choose another folder",
                where=str(folder),
            )
        _write(targets)
    _say(folder, targets)
    return list(targets)


def _write(targets: dict[Path, Path]) -> None:
    """Copy each source to its target, which must not be there; all of them or none."""
    written = []
    try:
        for target, source in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as stream:
                written.append(target)
                stream.write(source.read_bytes())
    except BaseException:
        for path in written:
            path.unlink()
        raise


def _say(folder: Path, targets: dict[Path, Path]) -> None:
    """What was written, and what to do next."""
    names = defaultdict(list)
    for path in targets:
        names[path.parent].append(path.name)
    for parent in names:
        say(f"{parent}: {', '.join(names[parent])}")
    say(f"{len(targets)} files written. See what the first one takes, or go the whole way with it:")
    if folder.resolve() != Path.cwd():
        say(f"  cd {shlex.quote(str(folder))}")
    say(f"  saescope harvest {FOLDER}/harvest/smollm2-135m-wikipedia.toml --plan")
    say("  saescope demo")
