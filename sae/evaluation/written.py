"""evaluation.json: what `saescope eval` measured, sealed by its own sha256."""

from pathlib import Path
from typing import Any

from saescope.artefact import DamagedError, check_schema, check_seal, read_json

EVALUATION_FILE = "evaluation.json"
SCHEMA = 2
"""the first was not written into the file, and had no sha256"""


def read_evaluation(path: Path) -> dict[str, Any]:
    """What was measured; ArtefactError if the file is missing, damaged or newer."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise DamagedError("is no evaluation", where=str(path))
    check_schema(found.get("schema", 1), supported=SCHEMA, where=str(path))
    check_seal(found, must="schema" in found, where=str(path))
    return found
