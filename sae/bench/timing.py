"""Times of things done in turn, so that what disturbs the machine disturbs them alike."""

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
        """Of the wall seconds."""
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
    """Each call once untimed, then `rounds` times in turn, each round beginning with the next."""
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
    """Call, and add what it took."""
    _finish(device)
    cpu, began = time.process_time(), time.perf_counter()
    call()
    _finish(device)
    times.seconds.append(time.perf_counter() - began)
    times.cpu_seconds.append(time.process_time() - cpu)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
