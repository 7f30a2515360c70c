"""Would members of a sweep train faster stacked? Rows of results/stacking.csv.

    python -m benchmarks.stacking [--members 6] [--threads 2]

Members of equal shape read the same batch, so their encoders could be one product with the rows of
all dictionaries below each other; everything after it (selection, decoding, sparse gradients, the
optimiser) is work on a member's own rows either way. Both products are timed in turns.
"""

import argparse
import csv
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn import functional

from saescope.artefact import git_commit
from saescope.progress import say

RESULTS = Path(__file__).parent / "results" / "stacking.csv"
SHAPES = ((2048, 576, 4096), (2048, 768, 8192), (2048, 64, 512))
"""batch, d_in, d_sae of each member"""


def compare(batch: int, d_in: int, d_sae: int, members: int, rounds: int) -> tuple[float, float]:
    """Median seconds of the members' products one by one, and of one product of all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, d_in, generator=generator)
    stacked = torch.randn(members * d_sae, d_in, generator=generator)
    bias = torch.randn(members * d_sae, generator=generator)
    alone = list(zip(stacked.split(d_sae), bias.split(d_sae), strict=True))
    rows = max(1, 2**22 // d_sae)  # as the kernels do it: a chunk of rows at a time

    def one_by_one() -> None:
        for W, b in alone:
            for part in x.split(rows):
                functional.linear(part, W, b)

    def at_once() -> None:
        for part in x.split(max(1, rows // members)):
            functional.linear(part, stacked, bias)

    seconds: dict[str, list[float]] = {"one": [], "all": []}
    for round_ in range(rounds + 1):
        for name, run in (("one", one_by_one), ("all", at_once)):
            start = time.perf_counter()
            run()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return statistics.median(seconds["one"]), statistics.median(seconds["all"])


def main() -> None:
    """Measure every shape and add its row."""
    parser = argparse.ArgumentParser(description="One by one, or stacked?")
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for batch, d_in, d_sae in SHAPES:
        one, both = compare(batch, d_in, d_sae, given.members, given.rounds)
        say(
            f"{given.members} members of {batch} x {d_in} x {d_sae}: "
            f"{one / both:.2f} times as fast stacked"
        )
        rows.append({
            "date": datetime.now(UTC).date().isoformat(), "batch": batch, "d_in": d_in,
            "d_sae": d_sae, "members": given.members, "dtype": "float32",
            "one_by_one_ms": f"{1e3 * one:.2f}", "stacked_ms": f"{1e3 * both:.2f}",
            "ratio": f"{one / both:.3f}", "threads": given.threads, "rounds": given.rounds,
            "torch": torch.__version__, "cpu": platform.processor() or platform.machine(),
            "commit": git_commit() or "",
        })  # fmt: skip
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
