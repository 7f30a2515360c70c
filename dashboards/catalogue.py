"""All SAEs that the explorer knows of: those with a store, and runs beside the stores without."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashboards import find_stores, queries
from dashboards.run_folders import RunFolder, find_runs
from saescope.errors import SaescopeError
from saescope.metrics import Metric, metric_table, shown_with_interval


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An SAE: what it is, what was measured, and what to do next."""

    name: str
    store: str | None = None
    """the store's name; None if it has none"""
    state: str
    """"indexed", or of a run without a store "finished", "running" or "stopped" """
    model: str = ""
    site: str = ""
    architecture: str = ""
    d_sae: int | None = None
    metrics: Mapping[str, Any]
    table: Mapping[str, Metric]
    protocol: str = ""
    """how it was measured; only SAEs with the same one compare"""
    problem: str = ""
    """why its store cannot be read"""
    folder: Path | None = None
    """its run's, where that is beside the stores"""
    todo: str = ""
    """what is missing, and the command that makes it"""

    def shown(self, name: str) -> str:
        """A metric with its interval; empty if it was not measured."""
        if not isinstance(self.metrics.get(name), int | float):
            return ""
        return shown_with_interval(self.table[name], self.metrics)


def runs() -> list[RunFolder]:
    """The runs beside the stores."""
    folder = find_stores.beside_stores()
    return find_runs(folder) if folder != folder.parent else []  # the root: nobody's project


def entries() -> list[Entry]:
    """Every store, in order, and then every run of which there is no store."""
    known = {run.path.resolve(): run for run in runs()}
    found, indexed = [], set()
    for name, path in find_stores.stores().items():
        try:
            meta, facts = queries.summary(queries.version_of(path))
        except (SaescopeError, OSError) as error:
            found.append(
                Entry(name=name, state="damaged", metrics={}, table={}, problem=str(error))
            )
            continue
        own = _run_of(meta.get("sae_path"), known)
        indexed |= {own.path.resolve()} if own else set()
        metrics = facts.metrics or (own.metrics() if own else {})
        found.append(
            Entry(
                name=name,
                store=name,
                state="indexed",
                model=facts.model,
                site=facts.site,
                architecture=facts.architecture,
                d_sae=facts.d_sae,
                metrics=metrics,
                table=facts.table,
                protocol=str(meta.get("protocol") or ""),
                folder=own.path if own else None,
                todo="" if metrics else f"measure it: saescope eval {_named(meta, own)}",
            )
        )
    return found + [_of_run(run) for path, run in known.items() if path not in indexed]


def _run_of(sae_path: object, known: Mapping[Path, RunFolder]) -> RunFolder | None:
    if not isinstance(sae_path, str):
        return None
    for path in (Path(find_stores.absolute(sae_path)), find_stores.moved(sae_path)):
        if path is not None and (run := known.get(path) or known.get(path.parent)):
            return run
    return None


def _named(meta: Mapping[str, Any], run: RunFolder | None) -> str:
    return str(run.path if run else meta.get("sae_path") or "RUN")


def _of_run(run: RunFolder) -> Entry:
    sae = run.config.get("sae") or {}
    metrics = run.metrics()
    if run.state == "finished":
        todo = f"see its features: saescope index {run.path} --out stores/{run.path.name}"
        if not metrics:
            todo = f"measure it: saescope eval {run.path}"
    else:
        todo = "" if run.state == "running" else "go on: call the same saescope train again"
    d_sae = sae.get("d_sae")
    return Entry(
        name=run.name,
        state=run.state,
        site=run.sites,
        architecture=str(sae.get("kind") or ""),
        d_sae=d_sae if isinstance(d_sae, int) else None,
        metrics=metrics,
        table=metric_table(),
        protocol=str(run.measured.get("protocol_hash") or ""),
        folder=run.path,
        todo=todo,
    )
