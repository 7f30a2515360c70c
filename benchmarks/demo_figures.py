"""The figures of the demo: run it, record what it printed and measured, show them in the README.

    python -m benchmarks.demo_figures --demo quick --folder NEW   # some minutes
    python -m benchmarks.demo_figures --demo full --folder NEW    # a quarter of an hour
    python -m benchmarks.demo_figures    # only the README, from what is recorded

The demo runs in a new folder, which is kept: from its store benchmarks/demo_features.py writes
docs/reports/demo_features.md, whose verdicts are people's.
"""

import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.running import run
from dashboards.demo_command import FULL, QUICK, Size
from sae.bench.rows import processor
from sae.evaluation.written import sections
from sae.formats.hub import evaluation_file
from sae.training.trainer import METRICS
from saescope.artefact import git_commit, write_bytes
from saescope.config import Config, read_toml
from saescope.errors import ArtefactError, InputError
from saescope.examples import examples
from saescope.metrics import Metric, metric, shown_with_interval
from saescope.progress import say
from store import FeatureStore
from store.database import STORE_FILE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
COLUMNS: tuple[str, ...] = (
    "date",
    "demo",
    "what",
    "value",
    "unit",
    "cpu",
    "threads",
    "torch",
    "commit",
)
SIZES: dict[str, Size] = {"quick": QUICK, "full": FULL}
HOME = "/home/me"
"""stands for the folder of the run in what was printed"""
_PROGRESS = re.compile(r"[\w' ]+: +(\d+%|[\d,]+ \w+$)")
_DONE = re.compile(r"([\w' ]+): done, [\d,]+ \w+ in (?:(\d+)m)?(\d+)s")
_FORESEEN = re.compile(r"about (\d+) minutes? \(([\d,]+) tokens/s, ([\d,]+) GFLOP/s here\)")


@dataclass(frozen=True, kw_only=True)
class FiguresConfig(Config):
    """Run a demo and record it, or only write the README anew."""

    demo: Literal["quick", "full", "none"] = "none"
    """Which to run."""
    folder: str | None = None
    """New folder to run it in."""


def work(config: FiguresConfig) -> None:
    """Run and record as asked, and write the README."""
    if config.demo != "none":
        if config.folder is None or Path(config.folder).exists():
            raise InputError("give a new folder to run in", where="folder", given=config.folder)
        record(config.demo, Path(config.folder))
    write_bytes(README, rendered(README.read_text(encoding="utf-8")).encode())
    say(f"{README.name}: written")


def record(demo: str, folder: Path) -> None:
    """Run a demo in a new folder, and write its output, its metrics and its rows to RESULTS."""
    folder.mkdir(parents=True)
    folder = folder.resolve()
    words = [sys.executable, "-m", "saescope", "demo", *(["--quick"] if demo == "quick" else [])]
    # all of them, on a slow machine too
    words += ["--tokens", str(read_toml(examples()[SIZES[demo].harvest])["max_tokens"])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        say(lines[-1])
    if process.wait():
        raise ArtefactError(f"the demo ended with code {process.returncode}", where=str(folder))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_time = sum(getattr(after, n) - getattr(before, n) for n in ("ru_utime", "ru_stime"))
    text = (
        "\n".join(without_progress(lines))
        .replace(str(folder), HOME)
        .replace(sys.executable, "python")
    )
    write_bytes(_output(demo), f"{text}\n".encode())
    trained = folder / read_toml(examples()[SIZES[demo].train])["out"]
    write_bytes(_evaluation(demo), evaluation_file(trained).read_bytes())
    shutil.copyfile(trained / METRICS, RESULTS / f"{_stem(demo)}_training.jsonl")
    figures = {
        **times(lines),
        "processor time": (processor_time, "s"),
        "peak resident memory": (after.ru_maxrss / 1024, "MiB"),
        **_sizes(folder, trained.name),
    }
    _write_rows(demo, figures)


def without_progress(lines: list[str]) -> list[str]:
    """What was printed besides progress."""
    return [line for line in lines if not _PROGRESS.match(line)]


def times(lines: list[str]) -> dict[str, tuple[float, str]]:
    """What the demo said of its time, before and after."""
    figures: dict[str, tuple[float, str]] = {}
    for line in lines:
        if found := _FORESEEN.match(line):
            minutes, tokens, product = (float(each.replace(",", "")) for each in found.groups())
            figures["foreseen"] = (60 * minutes, "s")
            figures["measured first: the model"] = (tokens, "tokens/s")
            figures["measured first: a product"] = (product, "GFLOP/s")
        if found := re.match(r"(demo): done in (?:(\d+)m)?(\d+)s", line) or _DONE.match(line):
            name, minutes, seconds = found.groups()
            figures[name] = (60.0 * int(minutes or 0) + int(seconds), "s")
    return figures


def _sizes(folder: Path, name: str) -> dict[str, tuple[float, str]]:
    with FeatureStore.open(folder / "stores" / name / STORE_FILE) as store:
        overview = store.overview()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "rows in the store": (overview.n_kept, "rows"),
        "features that fire on none of these rows": (overview.n_dead, f"of {overview.d_sae}"),
        "activations in the store": (overview.n_activations, "activations"),
        "disk": (size / 1e6, "MB"),
    }


def _write_rows(demo: str, figures: dict[str, tuple[float, str]]) -> None:
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "demo": demo,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": (git_commit() or "")[:7],
    }
    kept = [row for row in _rows() if row["demo"] != demo]
    new = [
        {**facts, "what": what, "value": round(value, 1), "unit": unit}
        for what, (value, unit) in figures.items()
    ]
    with (RESULTS / "demo.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new])


def _rows() -> list[dict[str, str]]:
    with (RESULTS / "demo.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _stem(demo: str) -> str:
    return "demo" if demo == "full" else "demo_quick"


def _output(demo: str) -> Path:
    return RESULTS / f"{_stem(demo)}_output.txt"


def _evaluation(demo: str) -> Path:
    return RESULTS / f"{_stem(demo)}_evaluation.json"


def rendered(readme: str) -> str:
    """The README with what is recorded between its marks."""
    parts = {
        "printed": f"```text\n{_output('quick').read_text(encoding='utf-8').rstrip()}\n```\n",
        "time": _time(),
        "results": _table(),
    }
    for name, text in parts.items():
        begin, end = f"<!-- {name}: benchmarks/demo_figures.py -->\n", f"<!-- end of {name} -->\n"
        before, found, rest = readme.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise InputError("the README lacks a mark", where=str(README), given=name)
        readme = f"{before}{begin}{text}{end}{after}"
    return readme


def _time() -> str:
    """How long each took, and where."""
    sentences = []
    for demo, words in (("quick", "The quick demo"), ("full", "the whole one")):
        rows = {row["what"]: row for row in _rows() if row["demo"] == demo}
        row, used = rows["demo"], rows.get("processor time")
        where = f"on {row['threads']} cores"
        if used:
            busy = float(used["value"]) < 0.6 * int(row["threads"]) * float(row["value"])
            where += " that had other work too" if busy else ""
            where += f", with {_minutes(used['value'])} of processor time"
        sentences.append(
            f"{words} took {_minutes(row['value'])} {where} ({row['cpu']}, {row['date']})"
        )
    return "; ".join(sentences) + ".\n"


def _minutes(seconds: str) -> str:
    minutes, rest = divmod(round(float(seconds)), 60)
    return f"{minutes} min {rest:02d} s"


def _table() -> str:
    columns = [_column(demo) for demo in ("quick", "full")]
    lines = ["| | `make demo QUICK=1` | `make demo` | from |", "|---|---|---|---|"]
    for name, source in _SOURCES.items():
        lines.append(f"| {name} | {columns[0][name]} | {columns[1][name]} | {source} |")
    return "\n".join(lines) + "\n"


_ROWS = "[demo.csv](benchmarks/results/demo.csv)"
_MEASURED = (
    "[quick](benchmarks/results/demo_quick_evaluation.json), "
    "[full](benchmarks/results/demo_evaluation.json)"
)
_CONFIGS = "[configs/](configs)"
_METRICS = ("l0", "fvu", "dead_fraction", "delta_ce", "recovered_mean", "recovered_zero")
_SOURCES = {
    "tokens of text": _CONFIGS,
    "d_sae; passes": _CONFIGS,
    "rows in the store": _ROWS,
    **{metric(name).title: _MEASURED for name in _METRICS},
    "features that fire on none of all rows": _ROWS,
    "activations in the store": _ROWS,
    "peak memory": _ROWS,
}


def _column(demo: str) -> dict[str, str]:
    """The cells of one demo."""
    measured = json.loads(_evaluation(demo).read_text(encoding="utf-8"))
    values: dict[str, Any] = {
        row["what"]: float(row["value"]) for row in _rows() if row["demo"] == demo
    }
    harvest, train = (
        read_toml(examples()[name]) for name in (SIZES[demo].harvest, SIZES[demo].train)
    )
    peak = values.get("peak resident memory")
    d_sae, dead = train["sae"]["d_sae"], values["features that fire on none of these rows"]
    return {
        "tokens of text": f"{harvest['max_tokens']:,}",
        "d_sae; passes": f"{d_sae:,}; {train['passes']:g}",
        "rows in the store": f"{values['rows in the store']:,.0f}",
        **{metric(name).title: _cell(metric(name), measured) for name in _METRICS},
        "features that fire on none of all rows": f"{dead / d_sae:.2%} ({dead:,.0f})",
        "activations in the store": f"{values['activations in the store']:,.0f}",
        "peak memory": f"{peak / 1024:.1f} GiB" if peak else "not recorded",
    }


def _cell(row: Metric, measured: dict[str, Any]) -> str:
    """A metric with its interval, and what it was measured on where it has one."""
    found = next(each for each in sections(measured).values() if row.name in each)
    text = shown_with_interval(row, found)
    if not row.interval:
        return text
    counted = next(key for key in ("rows", "tokens") if key in found)
    return f"{text} ({found[counted]:,} {counted})"


if __name__ == "__main__":
    run(FiguresConfig, work)
