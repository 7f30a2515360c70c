"""`saescope reproduce`: papers' central experiments, each beside its null, as pages."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saescope.artefact import atomic_path, parse_json
from saescope.config import Config
from saescope.errors import InputError
from saescope.paths import local, read_bytes
from saescope.progress import say
from saescope.replacing import Kind
from saescope.system import system_errors

_RESULTS = ".trials.jsonl"
_MARK = "<!-- saescope reproduce -->\n"
_MARKS = (_MARK.encode(), b'{"paper":', b"<svg xmlns", b"\x89PNG")


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(40).startswith(_MARKS)


_WRITTEN = Kind("a page of a paper, its pictures or its trials", _is_ours)


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(Config):
    """Run papers' central experiments at small scale, and write a page for each."""

    papers: tuple[str, ...] = ()
    """Their names; without any, papers are listed."""
    all: bool = False
    """All of them."""
    quick: bool = False
    """Few small trials: minutes, for a look."""
    out: str | None = None
    """Folder of trials and of what they need; what is there is gone on with. If not given, papers,
    and papers-quick for quick ones."""
    pages: str | None = None
    """Folder of the pages; `out` if not given."""

    def __post_init__(self) -> None:
        if self.all and self.papers:
            raise InputError("all papers, or some by name", where="papers", given=self.papers)


def reproduce(config: ReproduceConfig) -> None:
    """Run papers and write their pages, and the table of all verdicts in that folder.

    Raises InputError for a name that no paper has, and what an experiment raises.
    """
    from sae.papers import names, paper
    from sae.reproduction.trials import run_trials

    chosen = names() if config.all else config.papers
    if not chosen:
        for name in names():
            say(f"{name:<22} {paper(name).title}")
        return
    found = {name: paper(name) for name in chosen}
    out = local(config.out or ("papers-quick" if config.quick else "papers"))
    pages = local(config.pages or str(out))
    for name, each in found.items():
        trials = run_trials(name, each, out / name, quick=config.quick)
        write_page(name, trials, pages, quick=config.quick)
    write_verdicts(pages)


@system_errors()
def write_page(name: str, trials: Sequence[dict[str, Any]], pages: Path, *, quick: bool) -> None:
    """Write a paper's page, its pictures and its trials into a folder."""
    from dashboards.reports import paper_page
    from sae.papers import paper
    from sae.reproduction.trials import flat

    each = paper(name)
    findings = each.findings(flat(trials))
    results = f"{name}{_RESULTS}"
    header = {"paper": name, "quick": quick}
    lines = (json.dumps(row) + "\n" for row in (header, *trials))
    _write(pages / results, "".join(lines).encode())
    for file, content in paper_page.pictures(name, findings):
        _write(pages / file, content)
    text = paper_page.page(name, each, trials, findings, quick=quick, results=results)
    _write(pages / f"{name}.md", (_MARK + text).encode())
    say(f"{pages / name}.md: {findings.verdict}")
    for claim in findings.claims:
        holds = "holds" if claim.holds else "does not hold"
        half = f" ± {claim.half:{claim.form}}" if claim.half is not None else ""
        say(f"  {claim.says}: {holds}, {claim.gain:{claim.form}}{half} beyond its null")


@system_errors()
def write_verdicts(pages: Path) -> None:
    """Write README.md, the table of all papers whose trials are in a folder."""
    from dashboards.reports import paper_page
    from sae.papers import names, paper
    from sae.reproduction.trials import flat

    found = {}
    for name in names():
        path = pages / f"{name}{_RESULTS}"
        if path.exists():
            each = paper(name)
            found[name] = (each, each.findings(flat(read_results(path)[1])))
    _write(pages / "README.md", (_MARK + paper_page.verdicts(found)).encode())


def read_results(path: Path) -> tuple[bool, list[dict[str, Any]]]:
    """Whether trials beside a page are the quick ones, and the trials."""
    lines = read_bytes(path).splitlines()
    header, *trials = (parse_json(line, where=str(path)) for line in lines)
    return header["quick"], trials


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, _WRITTEN, replace=True) as temporary:
        temporary.write_bytes(content)
