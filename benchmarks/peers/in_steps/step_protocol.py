"""Steps on command: lines of JSON in on standard input, out on a pipe.

    python in_LIBRARY.py PIPE

    {"do": "load", "inputs": FOLDER, "kind": "topk", "l0": 32, "setting": "dense", "threads": 2}
    {"do": "step"}     one training step on the next batch, timed here
    {"do": "drop"}     forget all tensors

The pipe is the number of a file descriptor; standard output is for what libraries print. Each
command is answered by a line, {"error": ...} if it could not be done. Imported by the script of
every library, in that library's own environment, so it knows numpy and torch alone.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

TENSORS = ("x", "W_enc_T", "W_dec", "b_enc", "threshold", "dead")
LR = 1e-6
"""so small that every library steps on the same weights throughout"""
DEAD = 10**9
"""tokens (or steps) for which a dead feature has not fired"""


class Stepper(Protocol):
    """A library's trainer at given weights."""

    version: str
    options: str
    """what of its settings matters for speed, for the results"""

    def mark(self, dead: Tensor) -> None:
        """Set the counters of features bool [d_sae] so that they count as dead; not timed."""
        ...

    def step(self, x: Tensor) -> None:
        """One training step on rows [batch, d_in]."""
        ...

    def found(self, x: Tensor) -> dict[str, float]:
        """On rows: mean "l0" and "squared_error"; and how many were "dead" in the last step.

        Not timed.
        """
        ...

    def close(self) -> None:
        """Let go of what would outlive it."""
        ...


def measured(x: Tensor, features: Tensor, x_hat: Tensor, dead: int) -> dict[str, float]:
    """What `found` returns, from dense features [batch, d_sae] and x_hat [batch, d_in]."""
    return {
        "l0": float((features > 0).sum(1).float().mean()),
        "squared_error": float((x - x_hat).square().sum(1).mean()),
        "dead": dead,
    }


Make = Callable[[dict[str, Tensor], str, float, str], Stepper]
"""(tensors, architecture, L0, setting) to a stepper"""


def serve(make: Make) -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1)
    session = _Session(make)
    for line in sys.stdin:
        try:
            answer = session.do(json.loads(line))
        except Exception as error:  # whatever a library raises is the driver's to report
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Session:
    def __init__(self, make: Make) -> None:
        self.make = make
        self.stepper: Stepper | None = None
        self.drop()

    def drop(self) -> dict[str, Any]:
        if self.stepper is not None:
            self.stepper.close()
        self.tensors: dict[str, Tensor] = {}
        self.stepper = None
        self.steps = 0
        gc.collect()
        give_back()
        return {}

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "load":
            return self.load(command)
        return self.step() if command["do"] == "step" else self.drop()

    def load(self, command: dict[str, Any]) -> dict[str, Any]:
        self.drop()
        torch.set_num_threads(command["threads"])
        torch.manual_seed(0)
        folder = Path(command["inputs"])
        self.tensors = {
            # batches stay on disk (and in its cache, which all libraries share)
            name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
            for name in TENSORS
        }
        self.stepper = self.make(self.tensors, command["kind"], command["l0"], command["setting"])
        return {
            "version": self.stepper.version,
            "options": self.stepper.options,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def step(self) -> dict[str, Any]:
        assert self.stepper is not None, "load comes first"
        batches = self.tensors["x"]
        x = batches[self.steps % len(batches)].clone()
        self.stepper.mark(self.tensors["dead"].clone())
        cpu, began = time.process_time(), time.perf_counter()
        self.stepper.step(x)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        self.steps += 1
        # of the weights that were given: they hardly move
        found = self.stepper.found(x[:512]) if self.steps == 1 else {}
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, **found}
