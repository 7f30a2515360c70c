"""metrics.jsonl: one line of JSON a measurement, in the order of the steps."""

import json
from pathlib import Path
from typing import Any

from saescope.artefact import write_bytes


class MetricsLog:
    """Append measurements; a resumed run first drops what came after its checkpoint."""

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        lines = read_metrics(path) if path.exists() else []
        kept = [line for line in lines if line["step"] <= resume_step] if resume_step else []
        write_bytes(path, "".join(map(_line, kept)).encode())

    def append(self, step: int, **values: Any) -> None:
        """Add one line and flush it."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line({"step": step, **values}))


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics.jsonl (a torn last line, after a kill, is not one)."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
