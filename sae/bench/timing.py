"""Times of functions called in turn, so that what slows the machine down slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """Wall and processor seconds of each round."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of the wall seconds."""
        return statistics.median(self.seconds)

    def columns(self) -> dict[str, float | int]:
        """As rows of results have them."""
        return {
            "rounds": len(self.seconds),
            "median_s": self.median,
            "least_s": min(self.seconds),
            "cpu_s": statistics.median(self.cpu_seconds),
        }


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, device: str = "cpu"
) -> dict[str, Times]:
    """Time calls in turn: each once untimed, then `rounds` times; rounds start in rotation."""
    names = list(calls)
    times = {name: Times() for name in names}
    for name in names:
        timed(calls[name], device, Times())
    for number in range(rounds):
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            timed(calls[name], device, times[name])
    return times


def timed(call: Callable[[], object], device: str, times: Times) -> None:
    """Call, and add the time that it took."""
    _finish(device)
    cpu, began = time.process_time(), time.perf_counter()
    call()
    _finish(device)
    times.seconds.append(time.perf_counter() - began)
    times.cpu_seconds.append(time.process_time() - cpu)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
