"""Papers whose central experiment is run here: one file is one paper, found by its name.

A file has `PAPER`, a `sae.reproduction.paper.Paper`: what the paper claims, which trials show it,
how one is measured, and what follows from all of them. Nothing else has to be edited:
`saescope reproduce` runs it, keeps each trial, and writes its page. What two papers share is part
of the library.
"""

import importlib
import pkgutil

from sae.reproduction.paper import Paper
from saescope.errors import InputError


def names() -> list[str]:
    """The papers' names, sorted.

    >>> "hiding-data" in names()
    True
    """
    found = (each.name for each in pkgutil.iter_modules(__path__))
    return sorted(each.replace("_", "-") for each in found)


def paper(name: str) -> Paper:
    """The paper of a name; InputError if there is none."""
    if name not in names():
        raise InputError("no paper has this name", where="paper", given=name, allowed=names())
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").PAPER
