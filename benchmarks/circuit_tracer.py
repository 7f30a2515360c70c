r"""Our transcoders in circuit-tracer: the same features, reconstructions and attribution graph.

    python -m benchmarks.circuit_tracer --transcoders runs/smollm2-135m-transcoders \
        --harvest data/smollm2-135m-mlps

The set, and a cross-layer transcoder with random weights of the same sites (four layers of 64
features), are written in circuit-tracer's layout. In an environment of its own the library encodes
and decodes the same held-out rows, and builds the graph of a prompt, which `sae.circuit` builds
here. Differences of features and reconstructions are over the largest value of each; `top_20` is
how many of either's 20 most influential features are the other's too.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations import ActivationStore, load_model
from activations.loading.unshuffled import aligned_rows
from activations.models.files import folder_of
from benchmarks.peers.environments import CIRCUITS
from benchmarks.running import run, run_peer
from sae.architectures.cross_layer_transcoder import (
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
)
from sae.bench import rows as results
from sae.circuits.attribute import circuit
from sae.circuits.graph import FEATURE, Graph
from sae.circuits.pruning import completeness_score, replacement_score
from sae.core.base import SparseAutoencoder
from sae.formats import format_named
from sae.formats.transcoder_sets import load_transcoders, write_transcoders
from saescope.artefact import git_commit
from saescope.config import Config
from saescope.errors import check_range
from saescope.paths import remove
from saescope.progress import say

COLUMNS = (
    "date", "library", "version", "what", "layers", "rows", "features_difference",
    "reconstruction_difference", "active", "top_20", "influence_correlation", "replacement_library",
    "replacement", "completeness_library", "completeness", "commit",
)  # fmt: skip
TOP = 20
_LAYERS, _WIDTH = 4, 64
"""of the cross-layer transcoder"""


@dataclass(frozen=True, kw_only=True)
class CircuitTracerBenchmarkConfig(Config):
    """Compare a set of transcoders here and in circuit-tracer."""

    transcoders: str
    """Folder of a set of transcoders, one for every layer of the model."""
    harvest: str
    """Harvest of the sites that they read."""
    model: str = "smollm2-135m"
    """The model that they were trained on."""
    prompt: str = "The capital of France is the city of"
    """What is attributed; a BOS is put in front."""
    rows: int = 256
    """Held-out rows that are encoded."""
    max_features: int = 1500
    """Features that become nodes of the graph."""
    threads: int = 1
    """Threads of torch, in both."""
    work: str = "build/peers"
    """Folder for the environment and for what is written."""
    results: str = "benchmarks/results/circuit_tracer.csv"
    """File that rows are added to."""

    def __post_init__(self) -> None:
        for name in ("rows", "max_features", "threads"):
            check_range(name, getattr(self, name), low=1)


def random_clt(width: int, sites: list[str], written: list[str], x: Tensor) -> CrossLayerTranscoder:
    """A cross-layer transcoder of random weights, whose thresholds about 30 features pass."""
    torch.manual_seed(0)
    config = CrossLayerTranscoderConfig(d_sae=len(sites) * _WIDTH, layers=len(sites))
    sae = CrossLayerTranscoder(config, len(sites) * width, len(sites) * width)
    with torch.no_grad():
        for parameter in (*sae.decoders, sae.b_enc, sae.b_dec):
            parameter.normal_(std=0.1)
    sae.config = sae.config.with_target_l0(30.0)
    sae.calibrate(lambda: iter([x]))
    sae.metadata = {"site": sites[0], "sites": sites, "target_sites": written}
    return sae.eval()


@torch.no_grad()
def of_layers(saes: list[SparseAutoencoder], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Features and reconstructions of rows [layers, rows, d_in], layer by layer."""
    features = torch.stack([sae.encode(x) for sae, x in zip(saes, rows, strict=True)])
    written = torch.stack([sae(x).x_hat for sae, x in zip(saes, rows, strict=True)])
    return features, written


@torch.no_grad()
def across(sae: CrossLayerTranscoder, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a cross-layer transcoder, layer by layer."""
    x = torch.cat(list(rows), dim=-1)
    parts = sae.encode(x).chunk(sae.layers, dim=-1), sae(x).x_hat.chunk(sae.layers, dim=-1)
    return torch.stack(parts[0]), torch.stack(parts[1])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, over the largest value of each layer."""
    size = theirs.abs().amax(dim=(1, 2)).clamp_min(1e-30)
    return float(((ours - theirs).abs().amax(dim=(1, 2)) / size).max())


def graphs_alike(graph: Graph, found: dict[str, Any]) -> dict[str, Any]:
    """How much of a graph's most influential features is the library's."""
    nodes = np.flatnonzero(graph.kind == FEATURE)
    own = {
        (int(graph.layer[n]), int(graph.position[n]), int(graph.number[n])): graph.influence[n]
        for n in nodes
    }
    theirs = {tuple(f): i for f, i in zip(found["features"], found["influence"], strict=True)}
    top = [set(sorted(each, key=each.__getitem__)[-TOP:]) for each in (own, theirs)]
    both = sorted(own.keys() & theirs.keys())
    pair = np.array([[own[node], theirs[node]] for node in both])
    return {
        "active": found["active"],
        "top_20": len(top[0] & top[1]),
        "influence_correlation": f"{np.corrcoef(pair.T)[0, 1]:.6f}",
        "replacement_library": f"{found['replacement']:.5f}",
        "replacement": f"{replacement_score(graph):.5f}",
        "completeness_library": f"{found['completeness']:.5f}",
        "completeness": f"{completeness_score(graph):.5f}",
    }


def main(config: CircuitTracerBenchmarkConfig) -> None:
    """Run both; three rows in the results."""
    torch.set_num_threads(config.threads)
    folder = Path(config.work).absolute() / "circuit_tracer"
    remove(folder)
    folder.mkdir(parents=True)
    saes = load_transcoders(config.transcoders)
    read, written = ([s.metadata[n] for s in saes] for n in ("site", "target_site"))
    store = ActivationStore.open(config.harvest)
    pieces = aligned_rows(store, tuple(read), split="held_out", limit=config.rows)
    rows = torch.cat([torch.stack(tuple(by_site)) for by_site, _ in pieces], dim=1)
    first = torch.cat(list(rows[:_LAYERS]), dim=-1)
    clt = random_clt(saes[0].d_in, read[:_LAYERS], written[:_LAYERS], first)
    write_transcoders(saes, folder / "set")
    format_named("circuit_tracer").write(clt, folder / "clt")
    save_file(
        {"set": rows.contiguous(), "clt": rows[:_LAYERS].clone()}, folder / "rows.safetensors"
    )
    model = load_model(config.model, dtype="float32")
    bos = model.tokenizer.bos_token_id
    prompt = [bos, *model.tokenizer(config.prompt, add_special_tokens=False)["input_ids"]]
    settings = {
        "set": str(folder / "set"),
        "clt": str(folder / "clt"),
        "rows": str(folder / "rows.safetensors"),
        "tensors": str(folder / "theirs.safetensors"),
        "model": str(folder_of(config.model, None)[0]),
        "special_tokens": {
            name: getattr(model.tokenizer, name)
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if getattr(model.tokenizer, name, None)
        },
        "prompt": prompt,
        "max_outputs": 10,
        "probability": 0.95,
        "max_features": config.max_features,
        "threads": config.threads,
    }
    found = run_peer(CIRCUITS, CIRCUITS.script, settings, Path(config.work), folder)
    theirs = load_file(settings["tensors"])
    common = {
        "date": datetime.now(UTC).date().isoformat(),
        "library": CIRCUITS.name,
        "version": found["version"],
        "commit": git_commit(),
    }
    lines = []
    for name, pair in (("set", of_layers(saes, rows)), ("clt", across(clt, rows[:_LAYERS]))):
        kinds = ("features", "reconstruction")
        off = {
            f"{kind}_difference": f"{difference(own, theirs[f'{name}_{kind}']):.3g}"
            for kind, own in zip(kinds, pair, strict=True)
        }
        lines.append({**common, "what": name, "layers": len(pair[0]), "rows": rows.shape[1], **off})
    graph = circuit(model, saes, prompt, max_features=config.max_features, unread_errors=False)
    alike = graphs_alike(graph, found)
    lines.append({**common, "what": "graph", "layers": len(saes), "rows": len(prompt), **alike})
    for line in lines:
        say(", ".join(f"{key} {value}" for key, value in line.items() if key not in common))
    results.append(Path(config.results), lines, COLUMNS)


if __name__ == "__main__":
    run(CircuitTracerBenchmarkConfig, main)
