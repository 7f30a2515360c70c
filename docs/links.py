"""What the site makes of links to files of the repository, which it does not contain.

In the repository they lead to the file. In the site the file's path is shown instead, so that
nothing there leads nowhere; a path that does not exist is a warning, which ends a strict build.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)#\s]+)(?:#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.hooks.links")


def outside(source: str, target: str) -> str | None:
    """The repository's path of a link of page `source` (in docs/), None if it stays in docs/.

    >>> outside("how-to/own-model.md", "../../sae/core/base.py")
    'sae/core/base.py'
    >>> outside("how-to/own-model.md", "../glossary.md")
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target))
    return None if path.startswith("docs/") else path


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page's text."""

    def shown(link: re.Match[str]) -> str:
        path = outside(page.file.src_uri, link["target"])
        if path is None:
            return link[0]
        if not (ROOT / path).exists():
            log.warning("%s: no such file: %s", page.file.src_uri, path)
        text = link["text"].strip("`")
        return f"`{path}`" if path.endswith(text) else f"{link['text']} (`{path}`)"

    return LINK.sub(shown, markdown)
