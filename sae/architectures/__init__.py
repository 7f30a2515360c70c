"""The registry: one file here is one architecture, found by its name.

A file `name.py` defines a configuration with `kind: Literal["name"]`, the module and its
loss, and puts `@register` on the class. Nothing else has to be edited. A file whose name
begins with an underscore holds what several architectures share.

A module of another package does the same, under a kind that is not taken, and is named by an entry
point or by `--plugin` (`saescope.plugins`).
"""

import importlib
import pkgutil
from typing import TypeVar, get_args, get_type_hints

from sae.core.base import SparseAutoencoder
from saescope.errors import InputError, SaescopeError
from saescope.plugins import OPTION, VARIABLE, Plugin, plugins, registering

_REGISTRY: dict[str, type[SparseAutoencoder]] = {}
_LOADED: set[str] = set()
"""modules of other packages whose architectures are in the registry"""
HOW_TO_NAME = f"{OPTION} my.module, or {VARIABLE}=my.module"
SaeT = TypeVar("SaeT", bound=type[SparseAutoencoder])


def register(cls: SaeT) -> SaeT:
    """Add an architecture under its configuration's `kind`; of one here, its file's name.

    Raises InputError for a kind that another class has.
    """
    (kind,) = get_args(get_type_hints(cls.Config)["kind"])
    package, _, module = cls.__module__.rpartition(".")
    if package != __name__:
        _import_own()  # so that they have their names before anybody else
    elif kind != module:
        raise TypeError(f"kind {kind!r} must be the name of its file, {module!r}")
    if kind in _REGISTRY:
        raise InputError(
            "registers an architecture under a name that is taken",
            where=cls.__module__,
            given=kind,
            allowed=f"another name; {kind!r} is {_REGISTRY[kind].__module__}'s",
        )
    _REGISTRY[kind] = cls
    registering.add(cls.__module__)
    return cls


def list_architectures() -> dict[str, type[SparseAutoencoder]]:
    """Every known architecture by name, those of plug-ins included.

    Raises InputError for a plug-in that cannot be imported, registers nothing, or takes a name that
    is taken.

    >>> {"relu", "topk"} <= set(list_architectures())
    True
    """
    _import_own()
    for plugin in plugins():
        if plugin.module not in _LOADED:
            _load(plugin)
            _LOADED.add(plugin.module)
    return dict(sorted(_REGISTRY.items()))


def architecture(kind: str) -> type[SparseAutoencoder]:
    """The architecture of this name; InputError lists the known ones."""
    known = list_architectures()
    if kind not in known:
        raise InputError(
            f"no such architecture (one of another package needs {HOW_TO_NAME})",
            where="sae.kind",
            given=kind,
            allowed=known,
        )
    return known[kind]


def _import_own() -> None:
    for found in pkgutil.iter_modules(__path__):
        if not found.name.startswith("_"):
            importlib.import_module(f"{__name__}.{found.name}")


def _load(plugin: Plugin) -> None:
    """Import a plug-in's module; InputError unless that registers something, or has before."""
    before, known = dict(_REGISTRY), set(registering)
    try:
        module = importlib.import_module(plugin.module)
    except SaescopeError:
        _restore(before)
        raise
    except (Exception, SystemExit) as error:  # whatever a module does as it is imported
        _restore(before)
        raise InputError(
            f"cannot be imported: {type(error).__name__}: {error}",
            where=plugin.named_by,
            given=plugin.module,
        ) from error
    own = [name for name in registering if f"{name}.".startswith(f"{plugin.module}.")]
    registered = set(_REGISTRY.values())
    imported_before = [each for each in vars(module).values() if isinstance(each, type)]
    if registering == known and not own and registered.isdisjoint(imported_before):
        raise InputError(
            "registers no architecture (sae.architectures.register), nor any metrics",
            where=plugin.named_by,
            given=plugin.module,
        )


def _restore(registry: dict[str, type[SparseAutoencoder]]) -> None:
    _REGISTRY.clear()
    _REGISTRY.update(registry)
