"""The YAML files of other libraries, read as data alone."""

from pathlib import Path

import yaml

from sae.formats._given import Given
from saescope.artefact import write_bytes
from saescope.errors import ArtefactError

_LARGEST = 1 << 22
"""bytes; a list of some thousand files is far smaller"""


def read_yaml(path: Path) -> Given:
    """A file's mapping; ArtefactError if it is missing, damaged, or no mapping."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ArtefactError("is too large for a configuration", where=str(path))
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError("configuration is missing", where=str(path)) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ArtefactError(f"damaged configuration: {lines[0][:300]}", where=str(path)) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ArtefactError(
            "is no configuration", where=str(path), given=type(found).__name__, allowed="a mapping"
        )
    return Given(found, str(path))


def write_yaml(path: Path, values: dict[str, object]) -> None:
    """Write a mapping, its keys in the order given."""
    write_bytes(path, yaml.safe_dump(values, sort_keys=False).encode())
