"""Architectures of other packages: modules that define them, and how they are named.

A module registers its architectures as it is imported (`sae.architectures.register`). It is named
by `--plugin my.module` on the command line, in SAESCOPE_PLUGINS (several apart by commas), or, of
an installed package, by an entry point in the group saescope.architectures:

    [project.entry-points."saescope.architectures"]
    mine = "my.module"
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from saescope.errors import InputError

OPTION = "--plugin"
VARIABLE = "SAESCOPE_PLUGINS"
GROUP = "saescope.architectures"
registering: set[str] = set()
"""names of the modules that have registered something: an architecture, a family of metrics"""
HELP = (
    "",
    f"Architectures or metrics of your own package: {OPTION} my.module (as often as needed), or "
    f"{VARIABLE}=my.module",
)
"""lines of help of the commands that load SAEs"""


@dataclass(frozen=True)
class Plugin:
    """A module to import, and who named it."""

    module: str
    named_by: str


def plugins() -> list[Plugin]:
    """All modules that are named, those of installed packages first."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    return [*_installed(tuple(sys.path)), *(Plugin(name, OPTION) for name in names if name)]


@cache
def _installed(searched: tuple[str, ...]) -> list[Plugin]:
    """Those of the packages in these folders, which are looked through once."""
    del searched
    return [
        Plugin(each.module, f"entry point {each.name} of {each.dist.name if each.dist else GROUP}")
        for each in metadata.entry_points(group=GROUP)
    ]


@contextmanager
def taken_from(words: Sequence[str]) -> Iterator[list[str]]:
    """The words without `--plugin MODULE`; within the context these modules are named.

    They are named to processes that are started, too. The current folder is searched after all
    other places, here and there. Raises InputError for an option without a module.
    """
    rest: list[str] = []
    named: list[str] = []
    remaining = iter(words)
    for word in remaining:
        option, equals, value = word.partition("=")
        if option != OPTION:
            rest.append(word)
            continue
        module = value if equals else next(remaining, "")
        if not all(part.isidentifier() for part in module.split(".")):
            raise InputError("is no module's name", where=OPTION, given=module, allowed="my.module")
        named.append(module)
    if not named and not os.environ.get(VARIABLE):
        yield rest
        return
    before = {name: os.environ.get(name) for name in (VARIABLE, "PYTHONPATH")}
    here, searched = os.getcwd(), list(sys.path)  # noqa: PTH109
    for name, added in ((VARIABLE, ",".join(named)), ("PYTHONPATH", here)):
        apart = "," if name == VARIABLE else os.pathsep
        os.environ[name] = apart.join(filter(None, (before[name], added)))
    sys.path.append(here)
    try:
        yield rest
    finally:
        sys.path[:] = searched
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
