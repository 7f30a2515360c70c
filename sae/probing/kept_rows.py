"""Rows of results that outlive a kill: each part of a suite writes its own before the next."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from saescope.artefact import check_seal, read_json
from saescope.errors import ArtefactError
from saescope.progress import say
from saescope.seals import write_sealed

Row = dict[str, Any]


def kept_rows(path: Path, compute: Callable[[], Iterable[Row]], name: str) -> list[Row]:
    """The rows of a file, or computed now and written there; no file is written of none.

    Args: name is what the rows are of, for what is said of a damaged file, which is replaced.
    """
    if path.is_file():
        try:
            found = read_json(path)
            check_seal(found, must=True, where=str(path))
            return found["rows"]
        except ArtefactError as error:
            say(f"{error}; {name} is measured again")
    rows = list(compute())
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, {"schema": 1, "rows": rows})
    return rows
