"""Training steps of TopK on a GPU, and what they are made of: rows of results/gpu_steps.csv.

    python -m benchmarks.gpu_step [--shapes 8192x2304x65536x64 ...] [--precisions bfloat16 ...]

Needs torch, Triton, einops and this repository, and no network. Whole steps (forward and backward
pass, projection, clipping, Adam, renormalisation) of this repository, of plain dense torch and of
the libraries that are installed, in turn on the same tensors; the encoder's product alone, which
all of them need; and single operations with the kernels here and with torch's operators. Memory is
the peak while it runs, beyond the inputs: of a step with its weights, gradients and moments.

Precisions: float32; tf32: products of float32 rounded to that; autocast: bfloat16 products, float32
weights; bfloat16: weights and moments as well.
"""

import argparse
import csv
import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_peers import Step, peers
from sae import kernels
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.bench.dense import LR, DenseStep
from sae.bench.inputs import Inputs, Shape, planted, prepare
from sae.bench.timing import Times, interleaved
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.kernels import adam
from sae.training.optimisers import make_optimiser
from sae.training.step import update
from saescope.artefact import git_commit
from saescope.metrics import metric
from saescope.progress import say

RESULTS = Path(__file__).parent / "results" / "gpu_steps.csv"
COLUMNS: tuple[str, ...] = (
    "date", "device", "torch", "triton", "cuda", "commit", "precision", "batch", "d_in", "d_sae",
    "k", "kind", "name", "rounds", "median_ms", "least_ms", "over_product", "peak_mib", "fvu",
)  # fmt: skip
"""kind: product, operation or step; over_product: median over the encoder product's"""
PRECISIONS = ("float32", "tf32", "autocast", "bfloat16")
DEFAULT = {
    "8192x2304x65536x64": ("bfloat16", "autocast"),
    "4096x768x32768x32": ("float32", "tf32", "autocast", "bfloat16"),
}
_PRODUCT = "encoder product"


@dataclass(frozen=True)
class Case:
    """Tensors on the device, and how they are multiplied."""

    shape: Shape
    precision: str
    inputs: Inputs

    @contextmanager
    def active(self, *, autocast: bool = True) -> Iterator[None]:
        """Products have this precision within the context; autocast is left out if so asked."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        low = autocast and self.precision == "autocast"
        try:
            with torch.autocast(self.inputs.x.device.type, torch.bfloat16, enabled=low):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


def make_case(shape: Shape, precision: str, device: str) -> Case:
    """Planted rows and weights that fit them."""
    inputs = prepare(*planted(shape), "topk", shape.k).to(device)
    if precision == "bfloat16":
        low = {
            name: value.bfloat16() if value.is_floating_point() else value
            for name, value in vars(inputs).items()
        }
        inputs = Inputs(**low)
    return Case(shape, precision, inputs)


def our_step(inputs: Inputs, k: int, *, autocast: bool) -> Step:
    """What the trainer does in a step, without its checks, schedules and files."""
    sae = TopKSAE(TopKConfig(d_sae=len(inputs.W_dec), k=k), inputs.x.shape[-1])
    sae.to(inputs.x.device, inputs.x.dtype).train()
    with torch.no_grad():
        for name in ("W_enc_T", "W_dec", "b_enc"):
            getattr(sae, name).copy_(getattr(inputs, name))
    adam = make_optimiser("adam", sae.parameters(), lr=LR, unit_rows=[sae.W_dec])
    silent = torch.zeros(sae.d_sae, dtype=torch.int64, device=inputs.x.device)
    variance, device = inputs.variance, inputs.x.device.type

    def step(x: Tensor) -> float:
        state = TrainingState(dead=silent >= 10**8)
        adam.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = sae.training_output(TrainingBatch.of(x, variance=variance), state)
        output.loss.backward()
        update(sae, adam, lr=LR, clip=1.0, what="step")
        silent.add_(len(x)).masked_fill_(output.counts > 0, 0)
        return output.terms["fvu"].item()

    return step


def steps(case: Case) -> dict[str, Callable[[], Step]]:
    """What makes the steps to compare, by name."""
    inputs, k = case.inputs, case.shape.k
    autocast = case.precision == "autocast"

    def dense() -> Step:
        inner = DenseStep(inputs, "topk", k, "bfloat16" if autocast else "torch")

        def step(x: Tensor) -> float:
            inner.step(x)
            return inner.found["loss"]

        return step

    made = {"saescope": lambda: our_step(inputs, k, autocast=autocast), "dense torch": dense}
    others = {name: lambda make=make: make(inputs) for name, make in peers(k, autocast=autocast)}
    return made | others


def operations(case: Case) -> dict[str, Callable[[], object]]:
    """Single operations, with the kernels that are used here and with torch's."""
    inputs, k = case.inputs, case.shape.k
    x, W, b, W_dec = inputs.x[0], inputs.W_enc_T, inputs.b_enc, inputs.W_dec
    chosen = kernels.backend(x)
    d_sae, zero = len(W), x.new_zeros(x.shape[1])
    with case.active():
        index, value = kernels.module(chosen).topk(x, W, b, k)
    codes = (torch.arange(len(x) + 1, device=x.device) * k, index.view(-1), value.view(-1).relu())
    bars = torch.full((d_sae,), float(value.min(1).values.mean()), device=x.device)
    calls: dict[str, Callable[[], object]] = {
        _PRODUCT: lambda: functional.linear(x, W, b),
        "product and torch.topk": lambda: functional.linear(x, W, b).topk(k, sorted=False),
    }
    for name in dict.fromkeys((chosen, "torch")):
        module: Any = kernels.module(name)
        calls |= {
            f"product and top-k, {name}": lambda m=module: m.topk(x, W, b, k),
            f"product and threshold, {name}": lambda m=module: m.above(x, W, b, bars),
            f"decode, {name}": lambda m=module: m.decode(*codes, W_dec),
            f"decode, error and dots, {name}": lambda m=module: m.decode_error(
                *codes, W_dec, zero, x
            ),
            f"weight gradient, {name}": lambda m=module: m.weight_gradient(*codes, x, d_sae),
        }
    if chosen == "triton":
        from sae.kernels import triton_gradient

        for atomic in (False, True) if x.dtype == torch.float32 else (False,):
            calls[f"weight gradient, {'atomic' if atomic else 'fixed order'}, unsorted"] = (
                lambda atomic=atomic: triton_gradient.sum_by_feature(
                    codes[0], codes[1].clone(), codes[2], x, d_sae, atomic=atomic
                )
            )
    moments = [torch.zeros_like(W_dec) for _ in range(2)]
    weights, gradient = W_dec.clone(), torch.ones_like(W_dec)
    for name in dict.fromkeys((chosen, "torch")):
        calls[f"Adam of W_dec, {name}"] = lambda name=name: _adam(name, weights, gradient, moments)
    return calls


def _adam(name: str, weights: Tensor, gradient: Tensor, moments: list[Tensor]) -> None:
    with kernels.using(name), torch.no_grad():
        adam.adam_(
            weights, gradient, *moments, lr=LR, beta1=0.9, beta2=0.999, eps=1e-8, step=10,
            scale=0.5, unit_rows=True,
        )  # fmt: skip


def measure_operations(case: Case, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of the encoder's product and of single operations."""
    calls, device = operations(case), case.inputs.x.device.type
    with case.active(), torch.no_grad():
        for call in calls.values():
            call()  # compiles programs, takes workspaces
        memory = {name: peak_mib(call, device) for name, call in calls.items()}
        times = interleaved(calls, rounds=rounds, device=device)
    for name, found in times.items():
        kind = "product" if name == _PRODUCT else "operation"
        yield {"kind": kind, "name": name, "peak_mib": memory[name], **milliseconds(found)}


def measure_steps(case: Case, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of whole steps; what does not fit into memory is left out, with a line that says so."""
    x, device = case.inputs.x, case.inputs.x.device.type
    running: dict[str, Callable[[], float]] = {}
    memory, fvu = {}, {}
    with case.active(autocast=False):  # each step turns it on where its library does
        for name, make in steps(case).items():
            held = held_mib(device)
            try:
                step, batches = make(), itertools.cycle(x)
                running[name] = functools.partial(_next, step, batches)
                fvu[name] = running[name]()
                memory[name] = peak_mib(running[name], device, beyond=held)
            except torch.OutOfMemoryError:
                running.pop(name, None)
                say(f"{name}: out of memory")
        times = interleaved(running, rounds=rounds, device=device)
    for name, found in times.items():
        more = {"peak_mib": memory[name], "fvu": fvu[name]}
        yield {"kind": "step", "name": name, **more, **milliseconds(found)}


def _next(step: Step, batches: Iterator[Tensor]) -> float:
    return step(next(batches))


def milliseconds(times: Times) -> dict[str, float | int]:
    """As the columns have them."""
    return {
        "rounds": len(times.seconds),
        "median_ms": 1e3 * times.median,
        "least_ms": 1e3 * min(times.seconds),
    }


def held_mib(device: str) -> float:
    """MiB of the device that tensors take; not a number on a CPU."""
    if device != "cuda":
        return math.nan
    gc.collect()
    return torch.cuda.memory_allocated() / 2**20


def peak_mib(call: Callable[[], object], device: str, beyond: float | None = None) -> float:
    """MiB held at most during a call, beyond what was held before it; not a number on a CPU."""
    before = held_mib(device) if beyond is None else beyond
    if device != "cuda":
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20 - before


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a file, which is made if it is not there."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def run(shape: Shape, precision: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of one shape and precision, printed as well."""
    case = make_case(shape, precision, device)
    found = list(measure_operations(case, rounds))
    gc.collect()
    found += measure_steps(case, rounds)
    product = next(row["median_ms"] for row in found if row["kind"] == "product")
    say(f"{shape}, {precision}: median of {rounds}, over the encoder's product, peak of memory")
    for row in found:
        row |= {"over_product": row["median_ms"] / product, "precision": precision, **vars(shape)}
        fvu = f"   {metric('fvu').text(row['fvu'])}" if "fvu" in row else ""
        say(
            f"  {row['name']:36} {row['median_ms']:9.3f} ms {row['over_product']:7.2f} x"
            f" {row['peak_mib']:9.0f} MiB{fvu}"
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for, print it and add it to the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(DEFAULT), help="BATCHxD_INxD_SAExK")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="of every shape")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu with small --shapes tries the script out")
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if asked.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "",
        "cuda": torch.version.cuda or "",
        "commit": git_commit() or "",
    }
    for text in asked.shapes:
        for precision in asked.precisions or DEFAULT.get(text, ("float32",)):
            rows = run(Shape.parse(text), precision, asked.device, asked.rounds)
            append(asked.out, [{**facts, **row} for row in rows])


if __name__ == "__main__":
    main()
