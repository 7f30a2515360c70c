"""The memory of a harvest over time, in a process of its own; see benchmarks.harvest.

python -m benchmarks.harvest_memory '{"dtype": "bfloat16", "results": "peaks.json", ...}'

What is resident just before the first window, with the model loaded and run once, is the model's.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from activations.harvesting.pipeline import fill
from activations.harvesting.plan import planned_facts
from activations.models.language import Model
from activations.models.load import load_model
from activations.storage.window_data import WindowData
from activations.storage.writer import HarvestWriter
from benchmarks.harvest import HarvestBenchConfig
from saescope import memory
from saescope.progress import silent

_EVERY_S = 0.02


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise OSError("the system does not say how much memory a process has")


class _Noting(HarvestWriter):
    """Notes the largest memory so far whenever a window is committed."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.most, self.peaks = 0, list[int]()

    def write(self, data: WindowData) -> None:
        super().write(data)
        self.peaks.append(self.most)

    def watch(self, ended: threading.Event) -> None:
        """Look again and again until it is over."""
        while not ended.wait(_EVERY_S):
            self.most = max(self.most, resident())


def main(settings: dict[str, Any]) -> None:
    """Harvest so many windows; the peak above the model's after each, in MiB."""
    dtype, out = settings.pop("dtype"), Path(settings.pop("results"))
    config = HarvestBenchConfig(**settings)
    memory.keep_freed_memory()
    torch.set_num_threads(config.threads)
    model = load_model(config.model, dtype=dtype)
    assert isinstance(model, Model)
    context = config.context
    probe = planned_facts(config.harvest(dtype, 1, context), model)
    chosen = config.harvest(dtype, 1, config.windows * probe["sequences_per_window"] * context)
    facts = planned_facts(chosen, model)
    model.capture(torch.zeros(config.batch, context, dtype=torch.long), config.sites(1))
    writer, ended = _Noting.create(Path(chosen.out), facts), threading.Event()
    assert isinstance(writer, _Noting)
    before = resident()
    watcher = threading.Thread(target=writer.watch, args=(ended,))
    watcher.start()
    try:
        with silent():
            fill(chosen, model, writer)
    finally:
        ended.set()
        watcher.join()
    peaks = [max(0, peak - before) / 2**20 for peak in writer.peaks]
    out.write_text(json.dumps({"peaks_mib": peaks}), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
