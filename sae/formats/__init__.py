"""The registry of file formats: one file here is one format, found by its name.

A file defines a subclass of `Format` under `@register`. Nothing else has to be edited. A file whose
name begins with an underscore holds what several formats share.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import TypeVar

from sae.formats._format import Format
from saescope.errors import ArtefactError, InputError

_REGISTRY: dict[str, Format] = {}
FormatT = TypeVar("FormatT", bound=Format)


def register(cls: type[FormatT]) -> type[FormatT]:
    """Add a format under its name, which must be its file's."""
    module = cls.__module__.rpartition(".")[2]
    if cls.name != module:
        raise TypeError(f"format {cls.name!r} must be the name of its file, {module!r}")
    if cls.name in _REGISTRY:
        raise TypeError(f"format {cls.name!r} is registered twice")
    _REGISTRY[cls.name] = cls()
    return cls


def formats() -> dict[str, Format]:
    """Every known format by name.

    >>> sorted(formats())
    ['circuit_tracer', 'dictionary_learning', 'gemma_scope', 'saelens', 'saescope', 'sparsify']
    """
    for found in pkgutil.iter_modules(__path__):
        if not found.name.startswith("_"):
            importlib.import_module(f"{__name__}.{found.name}")
    return dict(sorted(_REGISTRY.items()))


def format_named(name: str) -> Format:
    """The format of this name; InputError lists the known ones."""
    known = formats()
    if name not in known:
        raise InputError("no such format", where="format", given=name, allowed=known)
    return known[name]


def recognise(folder: Path) -> Format:
    """The format of an SAE's folder.

    Raises ArtefactError, with the files that each format has, if it is none of the known.
    """
    for each in formats().values():
        if each.recognise(folder):
            return each
    wanted = "; ".join(f"{each.name}: {' + '.join(each.files)}" for each in formats().values())
    raise ArtefactError("no SAE here", where=str(folder), allowed=wanted)
