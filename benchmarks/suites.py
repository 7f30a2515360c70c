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
import time
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

    Linux counts the memory that this process has at its start too, where that is more.

    Raises ArtefactError if it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    load, start = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - start
        if process.returncode:
            said.seek(0)
            raise ArtefactError(f"failed: {said.read()[-600:]}", where=" ".join(command[:5]))
    return {
        "wall_s": round(wall, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "mib": round(usage.ru_maxrss / 1024),
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
