"""The registry: one file here is one architecture, found by its name.

A file `name.py` defines a configuration with `kind: Literal["name"]`, the module and its
objective, and puts `@register` on the class. Nothing else has to be edited. A file whose name
begins with an underscore holds what several architectures share.
"""

import importlib
import pkgutil
from typing import TypeVar, get_args, get_type_hints

from sae.core.base import SparseAutoencoder
from saescope.errors import InputError

_REGISTRY: dict[str, type[SparseAutoencoder]] = {}
SaeT = TypeVar("SaeT", bound=type[SparseAutoencoder])


def register(cls: SaeT) -> SaeT:
    """Add an architecture under its configuration's `kind`, which must be its file's name."""
    (kind,) = get_args(get_type_hints(cls.Config)["kind"])
    module = cls.__module__.rpartition(".")[2]
    if kind != module:
        raise TypeError(f"kind {kind!r} must be the name of its file, {module!r}")
    if kind in _REGISTRY:
        raise TypeError(f"architecture {kind!r} is registered twice")
    _REGISTRY[kind] = cls
    return cls


def list_architectures() -> dict[str, type[SparseAutoencoder]]:
    """Every known architecture by name.

    >>> {"relu", "topk"} <= set(list_architectures())
    True
    """
    for found in pkgutil.iter_modules(__path__):
        if found.name.startswith("_"):
            continue
        importlib.import_module(f"{__name__}.{found.name}")
    return dict(sorted(_REGISTRY.items()))


def architecture(kind: str) -> type[SparseAutoencoder]:
    """The architecture of this name; InputError lists the known ones."""
    known = list_architectures()
    if kind not in known:
        raise InputError("no such architecture", where="sae.kind", given=kind, allowed=known)
    return known[kind]
