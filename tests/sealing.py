"""Artefacts changed on purpose and sealed again, and brought to what older versions wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saescope.seals import FILES, seals_of, write_sealed


def change_sealed(path: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Change what a sealed JSON file says, and seal it and the files it lists as they are now."""
    described = json.loads(path.read_text())
    del described["sha256"]
    change(described)
    if FILES in described:
        described[FILES] = seals_of(path.parent, described[FILES])
    write_sealed(path, described)


def unseal(path: Path, schema: int) -> None:
    """Make a sealed JSON file what a schema without seals wrote."""
    described = json.loads(path.read_text())
    described.pop("sha256", None)
    described.pop(FILES, None)
    path.write_text(json.dumps({**described, "schema": schema}, indent=2))
