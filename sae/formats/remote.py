"""SAEs and runs in object stores: the files of theirs that are read, copied to this machine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from sae.formats import formats
from saescope.artefact import MANIFEST, DamagedError
from saescope.errors import ArtefactError
from saescope.paths import below, download, objects

if TYPE_CHECKING:
    from upath import UPath


@contextmanager
def copied(folder: "UPath", inner: str) -> Iterator[Path]:
    """A folder with the files that some format reads, there within the block.

    They are those right in a folder of an object store, and in its folder `inner`. An error that is
    raised in the block names the objects, not the copies. Raises ArtefactError if the store cannot
    be reached.
    """
    names = {n for each in formats().values() for n in (*each.files, *each.further_files)}
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary, folder.name or "bucket")
        here.mkdir()
        for path in objects(folder):
            *above, name = below(path, folder)
            wanted = any(fnmatch(name, pattern) for pattern in (*names, MANIFEST))
            if wanted and above in ([], [inner]):
                download(path, here.joinpath(*above, name))
        try:
            yield here
        except DamagedError as error:
            where = error.where.replace(str(here), str(folder))
            raise DamagedError(error.what, where=where, kind=error.kind) from error
        except ArtefactError as error:
            raise ArtefactError(str(error).replace(str(here), str(folder))) from error
