"""Stand-ins for packages that take seconds to import, for a process that only shows help.

A configuration class is in the same file as the class it configures, which imports torch; but
listing its fields needs no torch. Within `stand_ins`, whatever is imported from a heavy package is
an empty class that can be subclassed, called, indexed and used in annotations. Modules of ours that
were imported within it are removed from sys.modules afterwards, so nothing computes with stand-ins.
"""

import sys
from abc import ABCMeta
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HEAVY = frozenset(
    {
        "PIL",
        "datasets",
        "duckdb",
        "einops",
        "fsspec",
        "google_crc32c",
        "huggingface_hub",
        "jaxtyping",
        "numpy",
        "pandas",
        "plotly",
        "pyarrow",
        "safetensors",
        "scipy",
        "streamlit",
        "torch",
        "transformer_lens",
        "transformers",
        "triton",
        "upath",
        "zarr",
    }
)
OURS = ("saescope", "activations", "sae", "store", "dashboards")


@contextmanager
def stand_ins(names: Collection[str] = HEAVY) -> Iterator[None]:
    """Within the block, importing these packages gives stand-ins, unless they are imported already.

    >>> import sys
    >>> with stand_ins({"no_such_package"}):
    ...     from no_such_package.nn import Module
    ...     class Layer(Module): ...
    >>> "no_such_package" in sys.modules
    False
    """
    finder = _Finder({name for name in names if name not in sys.modules})
    before = set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in OURS or _stands_in(sys.modules[name]):
                _forget(name)


def _stands_in(module: ModuleType) -> bool:
    """Whether a module is a stand-in, or has one."""
    found = (module, *vars(module).values())
    return any(isinstance(each, _Module | _Kind) for each in found)


def _forget(name: str) -> None:
    module = sys.modules.pop(name)
    parent, _, child = name.rpartition(".")
    if vars(sys.modules.get(parent, module)).get(child) is module:
        delattr(sys.modules[parent], child)


class _Kind(ABCMeta):
    """Metaclass of stand-ins: any attribute exists, and a decorator returns what it decorates."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _stand_in(name)
        setattr(cls, name, found)  # the same one next time
        return found

    def __call__(cls, *given: Any, **options: Any) -> Any:
        decorates = len(given) == 1 and callable(given[0]) and not options
        return given[0] if decorates else cls

    def __getitem__(cls, _: Any) -> Any:
        return cls


def _stand_in(name: str) -> Any:
    return _Kind(name, (), {})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _stand_in(name)
        setattr(self, name, found)
        return found


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.names:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: a stand-in is empty."""
