"""`saescope report`: evaluations of one SAE or of many as a page of HTML or as Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dashboards.reports import html_page, markdown
from dashboards.reports.content import equal_distortion, report_of
from dashboards.reports.measured import Evaluation, read_measured
from saescope.artefact import atomic_path
from saescope.config import Config
from saescope.errors import InputError
from saescope.paths import AnyPath, as_path, exists, local
from saescope.progress import say
from saescope.replacing import Kind, check_replaceable
from saescope.system import system_errors
from saescope.terminal import complain

_WRITERS = {".html": html_page.page, ".md": markdown.text}
_HUB = "hf://"


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """Show what was measured on SAEs, in one file."""

    run: str
    """What was measured: folder of a run, of an SAE or of a sweep, URL of one, or an evaluation's
    file."""
    runs: tuple[str, ...] = ()
    """Further ones, shown beside it."""
    out: str = "report.html"
    """File to write: .html, one page that opens without a network, or .md."""
    replace: bool = False
    """Replace a report that is there."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix not in _WRITERS:
            raise InputError("no kind of report", where="out", given=self.out, allowed=_WRITERS)


def _is_report(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        beginning = file.read(400)
    return html_page.MARK in beginning or beginning.startswith(markdown.MARK)


REPORT = Kind("a report", _is_report)


@system_errors()
def report(config: ReportConfig) -> Path:
    """Write a report of evaluations; its path.

    SAEs of a sweep that were not measured are named and left out.

    Raises InputError for a run that was not measured, or if something else is at `out`;
    ArtefactError for a damaged evaluation.
    """
    out = local(config.out)
    check_replaceable(out, REPORT, replace=config.replace)
    evaluations = [
        read_measured(path, name)
        for name, path in _named(list(_files((config.run, *config.runs)))).items()
    ]
    text = _WRITERS[out.suffix](report_of(evaluations))
    with atomic_path(out, REPORT, replace=config.replace) as temporary:
        temporary.write_text(text, encoding="utf-8")
    for line in _summary(out, evaluations):
        say(line)
    return out


def _summary(out: Path, evaluations: Sequence[Evaluation]) -> Iterator[str]:
    protocols = len({each.protocol_hash for each in evaluations})
    what = "1 SAE" if len(evaluations) == 1 else f"{len(evaluations):,} SAEs"
    under = "" if protocols == 1 else f" under {protocols} protocols, which do not compare"
    yield f"{out}: {what}{under}"
    yield from equal_distortion(evaluations)


def _files(names: Sequence[str]) -> Iterator[AnyPath]:
    """The evaluations' files of runs, and of all runs of a sweep, each once."""
    seen: list[AnyPath] = []
    for name in names:
        path = _file(name)
        members = [] if exists(path) else _members(name)
        found = [each for each in (path, *members) if exists(each)]
        if not found:
            raise InputError(
                "has not been measured; `saescope eval` does that, and a report shows it",
                where=name,
                given=str(path),
            )
        for each in members:
            if each not in found:
                complain(f"{each.parent} has not been measured, and is left out")
        for each in found:
            if each not in seen:
                seen.append(each)
                yield each


def _file(name: str) -> AnyPath:
    path = as_path(name) if not name.startswith(_HUB) else None
    if path is not None and path.suffix == ".json":
        return path
    from sae.formats.hub import evaluation_file

    return evaluation_file(name)


def _members(name: str) -> list[AnyPath]:
    from sae.commands.sweep import MEMBERS, read_members

    folder = as_path(name) if not name.startswith(_HUB) else None
    if folder is None or not exists(folder / MEMBERS):
        return []
    return [folder / each / "evaluation.json" for each in read_members(folder)]


def _named(files: Sequence[AnyPath]) -> dict[str, AnyPath]:
    """Names that tell evaluations apart, as short as can be.

    >>> list(_named([Path("runs/a/evaluation.json"), Path("runs/b/evaluation.json")]))
    ['a', 'b']
    >>> list(_named([Path("x/a/evaluation.json"), Path("y/a/evaluation.json"), Path("hub.json")]))
    ['x/a', 'y/a', 'hub']
    """
    parts = [
        each.parent.parts if each.name == "evaluation.json" else (*each.parent.parts, _stem(each))
        for each in files
    ]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(one[-length:] == own[-length:] for one in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]) or ".")
    return dict(zip(names, files, strict=True))


def _stem(path: AnyPath) -> str:
    return path.name.removesuffix(".json").removesuffix(".evaluation")
