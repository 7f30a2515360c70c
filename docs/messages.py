"""The messages of errors, read from the code: the site's page of all messages lists them.

A message's text stands where the error is made, as `InputError("no such site", ...)`. What is put
in when it is raised is shown as an ellipsis.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, HERE = "reference/messages.md", "<!-- all messages -->"
ERRORS = ("InputError", "ArtefactError", "DamagedError", "ChangedError", "check_choice")
"""what is called with a message's text first"""
THEMES = {
    "Configuration, files and the command line": ("saescope",),
    "Text and other corpora": ("activations/corpora",),
    "Models and sites": ("activations/models", "activations/sites"),
    "Harvests": ("activations",),
    "Architectures and training": ("sae/architectures", "sae/core", "sae/training", "sae/data"),
    "SAEs of other libraries, and the hub": ("sae/formats",),
    "Evaluation and analysis": ("sae/evaluation", "sae/analysis"),
    "Steering": ("sae/steering",),
    "Commands": ("sae",),
    "Feature stores and labels": ("store",),
    "The explorer": ("dashboards",),
}
"""A folder's messages stand under the most particular theme that has it."""


def text_of(node: ast.expr) -> str | None:
    """The text of a literal, with an ellipsis for each value that is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return None


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in ("saescope", "activations", "sae", "store", "dashboards"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def messages() -> dict[str, list[str]]:
    """All messages by theme."""
    found: dict[str, set[str]] = {theme: set() for theme in THEMES}
    for path, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
                text = text_of(node.args[0])
                if text and text.strip("…: "):
                    found[_theme(path.relative_to(ROOT).as_posix())].add(text)
    return {theme: sorted(texts, key=str.lower) for theme, texts in found.items()}


def _theme(path: str) -> str:
    fits = [
        (len(folder), theme)
        for theme, folders in THEMES.items()
        for folder in folders
        if path.startswith(f"{folder}/")
    ]
    return max(fits)[1]


def literals() -> set[str]:
    """All literal texts of the code: a message may be put together somewhere else."""
    return {
        text
        for _, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.expr) and (text := text_of(node))
    }


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page's text."""
    if page.file.src_uri != PAGE:
        return markdown
    lines: list[str] = []
    for theme, texts in messages().items():
        lines += [f"## {theme}", "", *(f"- {_code(text)}" for text in texts), ""]
    return markdown.replace(HERE, "\n".join(lines))


def _code(text: str) -> str:
    return f"`` {' '.join(text.split())} ``"
