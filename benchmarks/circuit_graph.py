"""Time and memory of one attribution graph: a 30-token prompt through all layers of SmolLM2-135M.

    python -m benchmarks.circuit_graph --transcoders runs/smollm2-135m-transcoders

A row a run of the command in benchmarks/results/circuit_graph.csv. `seconds` is what one waits for,
`cpu_s` what the processors spent: where other work shares the machine, the second says more.
"""

import resource
import time
from dataclasses import dataclass
from pathlib import Path

from activations import Model, load_model
from benchmarks.running import run
from sae.bench import rows as results
from sae.circuits.attribute import circuit
from sae.circuits.graph import FEATURE
from sae.circuits.pruning import completeness_score, prune, replacement_score
from sae.commands.circuit import load_saes
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.progress import say

COLUMNS = (
    "date", "transcoders", "model", "tokens", "layers", "active", "features", "batch", "seconds",
    "cpu_s", "peak_mb", "pruned_features", "pruned_edges", "replacement", "completeness",
    "threads", "processor", "torch", "saescope", "commit",
)  # fmt: skip
_PROMPT = (
    "In 1912 the town had a harbour, two schools and a library, and the river rose so high in the "
    "night that by the morning the bridge at the mill was closed to all"
)


@dataclass(frozen=True, kw_only=True)
class CircuitGraphConfig(Config):
    """Time one attribution graph."""

    transcoders: str
    """Folder of the transcoders of the model's layers."""
    model: str = "smollm2-135m"
    """The model that they were trained on."""
    tokens: int = 30
    """Tokens of the prompt."""
    max_features: int = 4096
    """The most features that become nodes."""
    batch: int = 256
    """Features whose edges are computed at once."""
    results: str = "benchmarks/results/circuit_graph.csv"
    """File that the row is added to."""

    def __post_init__(self) -> None:
        check_range("tokens", self.tokens, low=2, high=30)


def measure(config: CircuitGraphConfig) -> None:
    """Time it, and add the row."""
    saes = load_saes((config.transcoders,))
    model = load_model(config.model, dtype="float32")
    if not isinstance(model, Model):
        raise InputError("is no language model", where="model", given=config.model)
    ids = model.tokenize(_PROMPT)[: config.tokens]
    circuit(model, saes, ids[:4], max_features=8)  # what is made once
    began, spent = time.perf_counter(), time.process_time()
    most, batch = config.max_features, config.batch
    graph = circuit(model, saes, ids, max_features=most, batch=batch, progress=True)
    seconds, cpu = time.perf_counter() - began, time.process_time() - spent
    small = prune(graph)
    facts = {name: each for name, each in results.facts("cpu").items() if name in COLUMNS}
    row = {
        **facts,
        "transcoders": Path(config.transcoders).name,
        "model": model.name,
        "tokens": len(ids),
        "layers": model.n_layers,
        "active": graph.facts["active_features"],
        "features": len(graph.nodes_of(FEATURE)),
        "batch": config.batch,
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "pruned_features": len(small.nodes_of(FEATURE)),
        "pruned_edges": small.n_edges,
        "replacement": round(replacement_score(graph), 4),
        "completeness": round(completeness_score(graph), 4),
    }
    say(f"{seconds:.1f} s ({cpu:.1f} s of processor time), {row['peak_mb']} MB")
    results.append(Path(config.results), [row], COLUMNS)


if __name__ == "__main__":
    run(CircuitGraphConfig, measure)
