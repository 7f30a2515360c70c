"""What each suite of `saescope eval` takes: minutes, processor seconds and memory.

    python -m benchmarks.suites --sae runs/smollm2-135m-topk-quick --quick

Runs one suite after another, each in a process of its own and with an empty cache of activations of
texts, and adds a row for each to the results. `whole_mib` is the most memory that the process held
at once; `model_mib` the same of one that loads the model and runs it on one sequence; `load` is
how many processes wanted to run, of the whole machine, on average of the minute before.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.running import run
from sae.bench import rows as results
from sae.evaluation import chosen, suites
from saescope.artefact import read_json
from saescope.config import Config
from saescope.errors import ArtefactError, check_range
from saescope.progress import duration, say

COLUMNS = (
    "date", "run", "suite", "quick", "wall_s", "cpu_s", "whole_mib", "model_mib", "load",
    "protocol_hash", "processor", "threads", "torch", "python", "saescope", "commit",
)  # fmt: skip
_MODEL = """
import sys
import torch
from sae.data.harvests import load_harvested_model, open_complete
harvest = open_complete(sys.argv[1])
model = load_harvested_model(harvest, harvest.manifest["model"]["dtype"])
with torch.inference_mode():
    model.logits(torch.from_numpy(harvest.tokens[:1]).long())
"""

_STARTER = """
import json, os, subprocess, sys, time
begun = time.monotonic()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
found = {
    "code": os.waitstatus_to_exitcode(status),
    "wall": time.monotonic() - begun,
    "cpu": usage.ru_utime + usage.ru_stime,
    "kib": usage.ru_maxrss,
}
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""
"""a small process that starts another: to Linux the peak of that one has what its starter held"""


@dataclass(frozen=True, kw_only=True)
class SuitesConfig(Config):
    """Measure what suites of metrics take."""

    sae: str
    """Folder of the run."""
    harvest: str = "data/smollm2-135m-quick"
    """Its harvest."""
    suites: tuple[str, ...] = ()
    """Suites, one after another; all there are if not given. With commas between them, as in
    core,geometry, they are measured in one process."""
    quick: bool = False
    """Whether suites are measured with --quick."""
    threads: int = 1
    """Threads of torch."""
    results: str = "benchmarks/results/suites.csv"
    """File that rows are added to."""
    keep: str | None = None
    """Folder where the evaluations stay, SUITE.json; they are removed if not given."""

    def __post_init__(self) -> None:
        check_range("threads", self.threads, low=1)
        for each in self.suites:
            chosen((), (each,))


def taken(command: Sequence[str], threads: int) -> dict[str, Any]:
    """Seconds, processor seconds and largest memory in MiB of a process.

    Raises ArtefactError if it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        usage = Path(folder) / "usage.json"
        starter = [sys.executable, "-c", _STARTER, str(usage), *command]
        done = subprocess.run(
            starter, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        found = read_json(usage) if usage.exists() else {"code": done.returncode}
    if found["code"]:
        raise ArtefactError(f"failed: {done.stdout[-600:]}", where=" ".join(command[:5]))
    return {
        "wall_s": round(found["wall"], 1),
        "cpu_s": round(found["cpu"], 1),
        "mib": round(found["kib"] / 1024),
        "load": round(load, 1),
    }


def main(config: SuitesConfig) -> None:
    """Measure each suite and add its row."""
    python = [sys.executable, "-c", _MODEL, config.harvest]
    model_mib = taken(python, config.threads)["mib"]
    say(f"the model alone: {model_mib:,} MiB")
    facts = {k: v for k, v in results.facts("cpu").items() if k in COLUMNS}
    for suite in config.suites or suites():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(config.keep or scratch)
            folder.mkdir(parents=True, exist_ok=True)
            out = folder / f"{suite.replace(',', '+')}.json"
            found = taken(
                [
                    *(sys.executable, "-m", "saescope", "eval", config.sae, "--suite", suite),
                    *("--harvest", config.harvest, "--out", str(out), "--replace"),
                    *("--probing.cache", str(Path(scratch) / "texts")),
                    *(["--quick"] if config.quick else []),
                ],
                config.threads,
            )
            row = {
                "run": Path(config.sae).name,
                "suite": suite,
                "quick": config.quick,
                **{name: found[name] for name in ("wall_s", "cpu_s", "load")},
                "whole_mib": found["mib"],
                "model_mib": model_mib,
                "protocol_hash": read_json(out)["protocol_hash"],
                **facts,
                "threads": config.threads,
            }
        results.append(Path(config.results), [row], COLUMNS)
        say(
            f"{suite}: {duration(found['wall_s'])}, {duration(found['cpu_s'])} of a processor, "
            f"{found['mib'] - model_mib:,} MiB above the model"
        )


if __name__ == "__main__":
    run(SuitesConfig, main)
