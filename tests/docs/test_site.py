"""The documentation's site: it builds strictly, and asks nothing of any other machine."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FETCHED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//")


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(out)],
        capture_output=True, text=True, cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_in_the_site_and_fetches_nothing(site: Path) -> None:
    pages = list((ROOT / "docs").rglob("*.md"))
    for page in pages:
        # a folder's README is its index
        named = page.with_stem("index") if page.name == "README.md" else page
        built = site / named.relative_to(ROOT / "docs").with_suffix(".html")
        assert not FETCHED.findall(built.read_text(encoding="utf-8")), built


def test_public_names_are_in_the_reference(site: Path) -> None:
    import activations
    import sae
    import store

    for package in (activations, sae, store):
        html = (site / f"reference/api/{package.__name__}.html").read_text(encoding="utf-8")
        for name in package.__all__:
            assert f'id="{package.__name__}.{name}"' in html, name


def test_examples_of_docstrings_are_code() -> None:
    as_markdown = runpy.run_path(str(ROOT / "docs" / "docstrings.py"))["as_markdown"]
    given = "Rows [n][d_in] of `a[0][1]`.\n\n>>> 1 + 1  # doctest: +SKIP\n2\n\nAfter."
    assert as_markdown(given) == (
        "Rows [n]\\[d_in] of `a[0][1]`.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nAfter."
    )


def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    """A link to no page, to no heading and to no file of the repository each count."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for hook in ("links.py", "messages.py", "docstrings.py"):
        shutil.copy(ROOT / "docs" / hook, docs)
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = re.sub(r"nav:\n(?: .*\n)+", "", settings).replace("watch: [", "watch: [] # [")
    (tmp_path / "mkdocs.yml").write_text(settings, encoding="utf-8")
    (tmp_path / "LICENSE").write_text("")
    for text, named in (
        ("[a](../LICENSE)", ()),
        ("[a](../LICENCE) [a](b.md) [a](#c)", ("LICENCE", "b.md", "#c")),
        ("::: sae.nothing", ("sae.nothing",)),
    ):
        (docs / "index.md").write_text(f"# Title\n\n{text}\n")
        done = build(tmp_path / "mkdocs.yml", tmp_path / "out")
        assert (done.returncode != 0) == bool(named), done.stderr
        assert all(name in done.stderr for name in named), done.stderr
