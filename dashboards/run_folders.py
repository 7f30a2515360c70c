"""Folders of training runs beside the stores: what they trained, how far they are.

Read as plain JSON, without torch; `saescope doctor` is what checks that such files are whole.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST, MEASUREMENTS, EVALUATION = "manifest.json", "metrics.jsonl", "evaluation.json"
_SAE = "sae"
_DEEPEST = 3
"""how many folders below the one that the stores' folder is in a run may be"""
_MOST = 500
_QUIET = 600.0
"""seconds without a measurement, after which a run that is not finished counts as stopped"""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and what its files say."""

    name: str
    """the last part of its path; more of it where several runs have the same"""
    path: Path
    config: Mapping[str, Any]
    """what was asked for; empty if its manifest cannot be read"""
    measured: Mapping[str, Any]
    """what `saescope eval` wrote; empty if it has not"""

    @property
    def state(self) -> str:
        """finished, running or stopped."""
        if (self.path / _SAE).is_dir():
            return "finished"
        try:
            age = time.time() - (self.path / MEASUREMENTS).stat().st_mtime
        except OSError:
            return "stopped"
        return "running" if age < _QUIET else "stopped"

    @property
    def sites(self) -> str:
        """Where the SAE is."""
        sites = self.config.get("sites") or [self.config.get("site")]
        return ", ".join(str(site) for site in sites if site)

    def metrics(self) -> dict[str, Any]:
        """The numbers that were evaluated, by name; None where there is none."""
        values: dict[str, Any] = {}
        for part in self.measured.values():
            if isinstance(part, dict):
                values |= {k: v for k, v in part.items() if isinstance(v, int | float | None)}
        return values


def find_runs(folder: Path) -> list[RunFolder]:
    """The runs in a folder and at most three folders deep, by path; at most 500."""
    found: list[Path] = []
    for depth in range(1, _DEEPEST + 1):
        pattern = "/".join(["*"] * depth + [MEASUREMENTS])
        found += [file.parent for file in sorted(folder.glob(pattern))[:_MOST]]
    names = [path.name for path in found]
    return [
        RunFolder(
            path.name if names.count(path.name) == 1 else str(path.relative_to(folder)),
            path,
            _json(path / MANIFEST).get("config") or {},
            _json(path / EVALUATION),
        )
        for path in found[:_MOST]
    ]


def _json(path: Path) -> dict[str, Any]:
    """A file's table; an empty one if it is missing or none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
