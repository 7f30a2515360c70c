"""Docstrings as the site's Markdown: an example (`>>> ...`) becomes a block of code."""

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`]*`)")


def as_markdown(text: str) -> str:
    """A docstring with its doctests fenced, and `[a][b]` in its prose kept from being a link."""
    lines: list[str] = []
    indent: str | None = None
    for line in text.splitlines():
        if indent is None and line.lstrip().startswith(">>>"):
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}```pycon")
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        if indent is None:
            pieces = CODE.split(line)
            pieces[::2] = [piece.replace("][", r"]\[") for piece in pieces[::2]]
            line = "".join(pieces)
        lines.append(re.sub(r"\s*# doctest: \+\S+.*", "", line))
    if indent is not None:
        lines.append(f"{indent}```")
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Applies `as_markdown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
