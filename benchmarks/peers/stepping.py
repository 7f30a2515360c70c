"""Workers: a process for each library and setting, that does a training step when told to."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.environments import HERE, STEPPED, python_of
from saescope.errors import ArtefactError

OURS = "saescope"
DENSE = "dense torch"
"""the baselines that are written here"""
SCRIPTS = {
    "SAELens": HERE / "in_steps" / "in_saelens.py",
    "dictionary_learning": HERE / "in_steps" / "in_dictionary_learning.py",
    "sparsify": HERE / "in_steps" / "in_sparsify.py",
    OURS: HERE / "in_steps" / "in_saescope.py",
    DENSE: HERE / "in_steps" / "in_saescope.py",
}
ENVIRONMENT = {
    # idle threads sleep, so that the others have the machine
    "OMP_WAIT_POLICY": "passive",
    # freed memory is kept for the next step: our command line sets this for itself, and without it
    # a dense step spends up to a quarter of its time on fresh pages
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
    # nothing is looked up or reported outside
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}
"""the same for every library"""
_LONGEST_S = 900


class Worker:
    """A library's process; steps one at a time, idle in between.

    Args:
        library: a name of SCRIPTS.
        work: folder of environments and logs.

    Raises ArtefactError if the environment cannot be made, or the process says that something
    failed.
    """

    def __init__(self, library: str, setting: str, *, work: Path, threads: int) -> None:
        self.library, self.setting, self.threads = library, setting, threads
        peer = STEPPED.get(library)
        python = python_of(peer, work) if peer else Path(sys.executable)
        self.log = work / f"steps-{library}-{setting}.log".replace(" ", "-")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # nothing of ours on a peer's path
        left_out = ("PYTHONPATH",) if peer else ()
        inherited = {name: value for name, value in os.environ.items() if name not in left_out}
        environment = {**inherited, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
        answers, pipe = os.pipe()
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [str(python.absolute()), str(SCRIPTS[library]), str(pipe)], stdin=subprocess.PIPE,
                stdout=log, stderr=log, env=environment, pass_fds=(pipe,),
            )  # fmt: skip
        os.close(pipe)
        self.answers = os.fdopen(answers, "rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        assert self.process.stdin is not None, "made with a pipe"
        self.process.stdin.close()

    def load(self, inputs: Path, kind: str, l0: float) -> dict[str, Any]:
        """Make its trainer at given weights: version, options, torch, threads."""
        return self._ask(
            do="load", inputs=str(inputs.resolve()), kind=kind, l0=l0, setting=self.setting,
            threads=self.threads,
        )  # fmt: skip

    def step(self) -> dict[str, Any]:
        """One step: seconds, cpu_seconds; at the first also l0 and dead."""
        return self._ask(do="step")

    def drop(self) -> None:
        """Forget all tensors."""
        self._ask(do="drop")

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None, "made with a pipe"
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("has ended") from None
        ready, _, _ = select.select([self.answers], [], [], _LONGEST_S)
        if not ready:
            raise self._failed(f"gave no answer in {_LONGEST_S} s")
        answer = self.answers.readline()
        if not answer:
            raise self._failed("has ended")
        found = json.loads(answer)
        if "error" in found:
            raise self._failed(found["error"])
        return found

    def _failed(self, why: str) -> ArtefactError:
        last = self.log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        said = f" ({last[0]})" if last else ""
        return ArtefactError(f"{why}{said}", where=f"{self.library} {self.setting}, {self.log}")
