"""The example configurations that come with saescope: the tree configs/ of a checkout.

`saescope/configs` is a link to that tree, so that an installed package has it too.
"""

import shlex
from pathlib import Path

FOLDER = "configs"
_HERE = Path(__file__).parent / FOLDER


def examples() -> dict[str, Path]:
    """The file of each example, by the name that is shown for it.

    >>> examples()["configs/train/topk.toml"].name
    'topk.toml'
    """
    found = {path.relative_to(_HERE).as_posix(): path for path in sorted(_HERE.rglob("*.toml"))}
    return {f"{FOLDER}/{name}": path for name, path in found.items()}


def how_to_get(path: str | Path) -> str:
    """What to say of a missing configuration file; "" if it is none of the examples.

    >>> how_to_get("work/configs/train/topk.toml")
    'it is an example that comes with saescope; `saescope init work` writes it there'
    >>> how_to_get("configs/train/mine.toml")
    ''
    """
    parts = Path(path).parts
    if "/".join(parts[-3:]) not in examples():
        return ""
    folder = shlex.quote(str(Path(*parts[:-3])))
    return f"it is an example that comes with saescope; `saescope init {folder}` writes it there"
