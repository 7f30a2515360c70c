"""Running a paper's trials, each kept as soon as it is done."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae.bench.rows import facts
from sae.reproduction.paper import Paper, Settings
from saescope.artefact import append_bytes, parse_json, sha256_json
from saescope.errors import ArtefactError
from saescope.locks import locked
from saescope.paths import read_bytes
from saescope.progress import Progress
from saescope.system import system_errors

TRIALS = "trials.jsonl"
_FACTS = ("date", "processor", "threads", "torch", "python", "saescope", "commit")


@system_errors()
def run_trials(name: str, paper: Paper, folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    """All trials of a paper: those that `folder` has already are read, the others are run.

    Each gives {"settings", "measured", "seconds", "facts"}; a trial that was not finished is begun
    again. Raises ArtefactError for damaged results, and what measuring raises.
    """
    wanted = [dict(each) for each in paper.trials(quick)]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "reproduction"):
        kept = {_key(each["settings"]): each for each in read_trials(folder / TRIALS)}
        done = sum(_key(each) in kept for each in wanted)
        with Progress(name, total=len(wanted), unit="trials", done=done) as progress:
            for settings in wanted:
                if _key(settings) in kept:
                    continue
                row = _run(paper, settings, folder)
                append_bytes(folder / TRIALS, (json.dumps(row) + "\n").encode())
                kept[_key(settings)] = row
                progress.advance(note=_words(settings))
    return [kept[_key(each)] for each in wanted]


def _run(paper: Paper, settings: Settings, folder: Path) -> dict[str, Any]:
    begun = time.monotonic()
    measured = dict(paper.measure(settings, folder))
    seconds = time.monotonic() - begun
    known = facts("cpu")
    return {
        "settings": dict(settings),
        "measured": measured,
        "seconds": round(seconds, 2),
        "facts": {key: known[key] for key in _FACTS},
    }


def read_trials(path: Path) -> list[dict[str, Any]]:
    """The trials that a file has; none if it is not there.

    Raises ArtefactError if it is damaged otherwise.
    """
    if not path.exists():
        return []
    *lines, last = read_bytes(path).split(b"\n")
    found = [parse_json(line, where=f"{path}, line {n}") for n, line in enumerate(lines, 1)]
    for number, each in enumerate(found, 1):
        if not isinstance(each, Mapping) or not {"settings", "measured"} <= set(each):
            raise ArtefactError("is not a trial", where=f"{path}, line {number}")
    if last:
        raise ArtefactError("its last line has no end; remove that line", where=str(path))
    return found


def flat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Trials as rows of settings and measured values together."""
    return [{**each["settings"], **each["measured"]} for each in rows]


def _key(settings: Settings) -> str:
    return sha256_json(dict(settings))


def _words(settings: Settings) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())
