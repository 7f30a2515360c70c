"""Public names of a package, imported when they are first used.

They are listed once, as plain imports in the package's `__init__.pyi`: type checkers and editors
read that file, and so does this module.
"""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def public_names(
    package: str,
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from its `__init__.pyi`.

    >>> import sae
    >>> "load" in sae.__all__
    True
    """
    module = sys.modules[package]
    listed = Path(str(module.__file__)).with_suffix(".pyi").read_text(encoding="utf-8")
    where = {
        alias.name: str(node.module)
        for node in ast.parse(listed).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(where[name]), name)
        setattr(module, name, value)
        return value

    return get, lambda: sorted({*vars(module), *where}), sorted(where)
