"""`saescope circuit`: the attribution graph of a prompt, pruned, printed and written to files."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sae.circuits.attribute import Method, circuit
from sae.circuits.files import GRAPH_FILE, checked_path, save
from sae.circuits.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Graph
from sae.circuits.neuronpedia import to_neuronpedia
from sae.circuits.outputs import Output
from sae.circuits.pruning import completeness_score, prune, replacement_score
from sae.commands.model_of import model_of
from sae.core.base import SparseAutoencoder
from sae.formats.load import load
from sae.formats.transcoder_sets import load_transcoders
from saescope.artefact import write_report
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.paths import if_local, local
from saescope.progress import say
from saescope.replacing import Kind, check_replaceable

_STRONGEST = 3
"""sources that are printed of each node"""


@dataclass(frozen=True, kw_only=True)
class CircuitConfig(Config):
    """The circuit of a prompt: its graph through transcoders, pruned."""

    run: str
    """Folder of a sweep that trained a transcoder a layer, or of a run or an SAE."""
    runs: tuple[str, ...] = ()
    """Further runs and SAEs, where they are given one by one."""
    prompt: str
    """Text whose next token is explained."""
    model: str | None = None
    """Model, a folder or a name; the one the SAEs were trained on if not given."""
    method: Method = "linear"
    """How edges are computed: linear (attention and norms held: exact, for transcoders); gradient
    or integrated (gradient x activation, or its mean over a way: estimates, for SAEs of any sites),
    by which a node's influence is its effect on the outputs."""
    outputs: tuple[str, ...] = ()
    """Tokens to explain, as texts (a word within a text begins with its space); the likeliest if
    not given."""
    against: str | None = None
    """Token whose logit is taken off that of each of the outputs."""
    max_outputs: int = 10
    """The most of the likeliest tokens to explain."""
    probability: float = 0.95
    """Explain the likeliest tokens until they have this probability together."""
    max_features: int = 4096
    """The most features that become nodes; what the others write is counted with the errors."""
    batch: int = 256
    """Features whose edges are computed at once; less takes less memory."""
    prune: float = 0.8
    """Keep the nodes that have this share of all influence on the outputs; 1 keeps all."""
    edges: float = 0.98
    """Keep the edges that carry this share of it between them."""
    top: int = 20
    """Nodes to print, the most influential first."""
    out: str | None = None
    """File to write the pruned graph to: .npz or .json."""
    neuronpedia: str | None = None
    """File to write the pruned graph to as the JSON that Neuronpedia's graph viewer reads."""
    replace: bool = False
    """Replace files of graphs that are there."""
    allow_other_model: bool = False
    """Use SAEs that were trained on another model (base and fine-tuned, say)."""
    trust_remote_code: bool = False
    """Run the code that comes with the model, if it needs it."""

    def __post_init__(self) -> None:
        check_range("max_outputs", self.max_outputs, low=1)
        check_range("probability", self.probability, above=0, high=1)
        check_range("max_features", self.max_features, low=1)
        check_range("batch", self.batch, low=1)
        check_range("prune", self.prune, low=0, high=1)
        check_range("edges", self.edges, low=0, high=1)
        check_range("top", self.top, low=0)
        if self.against is not None and not self.outputs:
            raise InputError("is taken off outputs; give them", where="against")


def circuit_of_prompt(config: CircuitConfig) -> Graph:
    """Print and return the pruned graph of a prompt; write it where that is asked for.

    Raises InputError for SAEs that do not fit the model, outputs that are no single tokens, and
    files that may not be written, before anything is computed.
    """
    _check_files(config)
    saes = load_saes((config.run, *config.runs))
    model = model_of(
        saes[0], config.model, where=config.run, trust_remote_code=config.trust_remote_code
    )
    outputs: list[Output] = [
        each if config.against is None else (each, config.against) for each in config.outputs
    ]
    whole = circuit(
        model,
        saes,
        config.prompt,
        method=config.method,
        outputs=outputs or None,
        max_outputs=config.max_outputs,
        probability=config.probability,
        max_features=config.max_features,
        batch=config.batch,
        allow_other_model=config.allow_other_model,
        progress=True,
    )
    graph = prune(whole, nodes=config.prune, edges=config.edges)
    scores = {"replacement": replacement_score(whole), "completeness": completeness_score(whole)}
    graph.facts["scores"] = {name: round(value, 4) for name, value in scores.items()}
    _tell(graph, whole, config.top)
    if config.out is not None:
        save(graph, config.out, replace=config.replace)
        say(f"written to {config.out}")
    if config.neuronpedia is not None:
        path = local(config.neuronpedia)
        found = to_neuronpedia(graph, _slug(path.stem))
        write_report(path, found, _NEURONPEDIA, replace=config.replace)
        say(f"for Neuronpedia: {config.neuronpedia}")
    return graph


def load_saes(runs: tuple[str, ...]) -> list[SparseAutoencoder]:
    """The SAEs of a folder of runs, or of runs one by one; each knows its path as its name.

    Raises InputError or ArtefactError for what is none.
    """
    folder = if_local(runs[0])
    if len(runs) == 1 and folder is not None and _is_set(folder):
        return load_transcoders(runs[0])
    found = []
    for run in runs:
        sae = load(run)
        sae.metadata.setdefault("name", run)
        found.append(sae)
    return found


def _is_set(folder: Path) -> bool:
    """Whether a folder has runs in it and is none itself."""
    own = any((folder / name).is_file() for name in ("manifest.json", "config.json", "cfg.json"))
    inside = folder.is_dir() and any(each.is_dir() for each in folder.iterdir())
    return inside and not own


def _check_files(config: CircuitConfig) -> None:
    if config.out is not None:
        check_replaceable(checked_path(config.out), GRAPH_FILE, replace=config.replace)
    if config.neuronpedia is not None:
        path = local(config.neuronpedia)
        _slug(path.stem)
        check_replaceable(path, _NEURONPEDIA, replace=config.replace)


def _slug(stem: str) -> str:
    """What a graph is called in Neuronpedia's addresses, from its file's name."""
    slug = "".join(c if c.isalnum() and c.isascii() else "-" for c in stem.lower()).strip("-")
    if not slug:
        raise InputError("its name has no letter or digit", where="neuronpedia", given=stem)
    return slug


def _is_neuronpedia(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and {"metadata", "qParams", "nodes", "links"} <= set(found)


_NEURONPEDIA = Kind("a graph for Neuronpedia", _is_neuronpedia)


def _tell(graph: Graph, whole: Graph, top: int) -> None:
    """Print what a graph has: its outputs, scores, and the most influential nodes."""
    outputs = ", ".join(graph.describe(node) for node in graph.nodes_of(LOGIT).tolist())
    counts = " and ".join(
        f"{np.sum(graph.kind == kind):,} of {np.sum(whole.kind == kind):,} {name}"
        for kind, name in ((FEATURE, "features"), (ERROR, "errors"))
    )
    left_out = whole.facts["left_out"]
    say(outputs, lines=True)
    say(
        f"kept {counts}, {graph.n_edges:,} edges"
        + (f"; {left_out:,} active features are counted with the errors" if left_out else "")
    )
    scores = graph.facts["scores"]
    say(f"replacement score {scores['replacement']:.3f}, completeness {scores['completeness']:.3f}")
    inner = graph.nodes_of(FEATURE, ERROR, EMBEDDING)
    total = max(float(np.abs(whole.influence).sum()), 1e-30)
    for node in inner[np.argsort(-np.abs(graph.influence[inner]), kind="stable")][:top].tolist():
        share = abs(float(graph.influence[node])) / total
        sources, weights = graph.incoming(node)
        pairs = zip(sources[:_STRONGEST].tolist(), weights[:_STRONGEST].tolist(), strict=True)
        strongest = ", ".join(f"{graph.ids[source]} {weight:+.3g}" for source, weight in pairs)
        from_where = f"  <- {strongest}" if strongest else ""
        say(f"{share:6.2%}  {graph.ids[node]}: {graph.describe(node)}{from_where}", lines=True)
