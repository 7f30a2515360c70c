"""Two circuits of SmolLM2-135M beside what chance gives: induction, and the indirect object.

    python -m benchmarks.circuits --transcoders runs/smollm2-135m-transcoders

For each prompt the graph of a difference of two logits: in induction, of random tokens that are
begun again, the token that came next before against another of them (Olsson et al. 2022, arXiv
2209.11895); for the indirect object, the name that stands once against the one that stands twice
(Wang et al. 2023, arXiv 2211.00593). Prompts are drawn until there are enough whose likeliest next
token is the right one: only these are measured. With 95% intervals over prompts (Student's t):

    right                        share of the prompts drawn; `prompts` is how many were drawn
    difference of logits         of the model; the null is without any feature (each at its mean)
    faithfulness, completeness   of the most influential features kept alone, or ablated alone,
                                 beside as many drawn from the same graph
                                 (`sae.circuits.faithfulness`): a mean over prompts, and "pooled",
                                 the share of all prompts' changes together, in which a prompt that
                                 hardly depends on features does not count for more
    rank, sign                   agreement of estimates with exact ablation over features of the
                                 graph: Spearman's rank correlation (of sizes, for influence), and
                                 the share of equal signs among the larger half; beside the same
                                 with the estimates shuffled

A row a task, measure and number of features in benchmarks/results/circuits.csv; the graphs' most
influential features are in benchmarks/results/circuits.json.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from activations import Model, load_model
from benchmarks.running import run
from sae.bench import rows as results
from sae.circuits.assemble import assemble
from sae.circuits.attribute import circuit, parts_of
from sae.circuits.effects import ablation_effects, estimated_effects
from sae.circuits.faithfulness import faithfulness
from sae.circuits.graph import FEATURE, Graph
from sae.circuits.outputs import outputs_of
from sae.circuits.pruning import completeness_score, replacement_score
from sae.circuits.rows import EdgeRows
from sae.commands.circuit import load_saes
from sae.core.base import SparseAutoencoder
from sae.evaluation.intervals import half_width, t_quantile
from saescope.artefact import write_json
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.progress import say

COLUMNS = (
    "date", "transcoders", "model", "ranked_by", "task", "measure", "features", "prompts", "mean",
    "half", "null", "null_half", "max_features", "seed", "threads", "processor", "torch",
    "saescope", "commit",
)  # fmt: skip
_TOKENS = range(1_000, 20_000)
"""what induction draws from: pieces of text, neither special nor rare"""
_REPEATED, _AGAIN = 12, 10
"""different tokens of an induction prompt, and how many of them stand twice"""
_TRIES = 8
"""prompts drawn for each that is wanted, at most"""
_NAMES = ("Mary", "John", "Anna", "Peter", "Sarah", "David", "Laura", "Michael")
_GIFTS = (("store", "a drink"), ("park", "a book"), ("school", "a letter"), ("house", "the key"))

Case = tuple[list[int], int, int]
"""a prompt, the token that is right, and the one it is held against"""


@dataclass(frozen=True, kw_only=True)
class CircuitsConfig(Config):
    """Find the circuits of two tasks, and measure how far they are what they say."""

    transcoders: str
    """Folder of the transcoders of the model's layers."""
    model: str = "smollm2-135m"
    """The model that they were trained on."""
    prompts: int = 6
    """Prompts of each task, all of which the model answers rightly."""
    max_features: int = 256
    """The most features that become nodes of a graph."""
    counts: tuple[int, ...] = (16, 64, 256)
    """Features to keep, for each point of the curves."""
    ablated: int = 24
    """Features of each graph that are ablated one by one."""
    draws: int = 2
    """Random sets of features beside each."""
    seed: int = 0
    """Of prompts and random sets."""
    ranked_by: Literal["influence", "effect"] = "influence"
    """What makes a feature one of the circuit: its influence in the linear graph, or the size of
    its effect by gradient x activation, for which no edges are computed."""
    results: str = "benchmarks/results/circuits.csv"
    """File that rows are added to; the features are in a .json file beside it."""

    def __post_init__(self) -> None:
        check_range("prompts", self.prompts, low=2)


def induction(_: Model, rng: np.random.Generator) -> Case:
    """Random tokens, begun again: what comes next is what came next before."""
    ids = rng.choice(np.array(_TOKENS), _REPEATED, replace=False).tolist()
    return [*ids, *ids[:_AGAIN]], ids[_AGAIN], ids[(_AGAIN + 2) % _REPEATED]


def indirect_object(model: Model, rng: np.random.Generator) -> Case:
    """Two names, of which one gives something to the other."""
    first, second = rng.choice(_NAMES, 2, replace=False).tolist()
    where, what = _GIFTS[int(rng.integers(len(_GIFTS)))]
    giver, other = (first, second) if rng.integers(2) else (second, first)
    text = f"When {first} and {second} went to the {where}, {giver} gave {what} to"
    (right,), (wrong,) = model.tokenize_batch([f" {other}", f" {giver}"])
    return model.tokenize(text), int(right), int(wrong)


TASKS = {"induction": induction, "indirect object": indirect_object}


def right_cases(
    model: Model, draw: Callable[[Model, np.random.Generator], Case], config: CircuitsConfig
) -> tuple[list[Case], int]:
    """Different prompts that the model answers rightly, and how many were drawn to find them.

    Raises InputError where too few of those drawn are answered rightly.
    """
    rng = np.random.default_rng(config.seed)
    found: list[Case] = []
    drawn: set[tuple[int, ...]] = set()
    for _ in range(_TRIES * config.prompts):
        ids, right, wrong = draw(model, rng)
        if tuple(ids) in drawn:
            continue
        drawn.add(tuple(ids))
        if int(model.logits(torch.tensor([ids]))[0, -1].argmax()) == right:
            found.append((ids, right, wrong))
        if len(found) == config.prompts:
            return found, len(drawn)
    raise InputError(
        "the model is right on too few prompts",
        where="prompts",
        given=config.prompts,
        allowed=f"up to {len(found)}",
    )


def measure(config: CircuitsConfig) -> None:
    """Measure both tasks, and add the rows."""
    saes = load_saes((config.transcoders,))
    model = load_model(config.model, dtype="float32")
    if not isinstance(model, Model):
        raise InputError("is no language model", where="model", given=config.model)
    written, features = [], {}
    for task, draw in TASKS.items():
        cases, drawn = right_cases(model, draw, config)
        graphs = []
        for ids, *pair in cases:
            say(f"{task}: {''.join(model.token_strings(ids))}")
            make = circuit if config.ranked_by == "influence" else ranked_by_effect
            options = {"outputs": [tuple(pair)], "max_features": config.max_features}
            graphs.append(make(model, saes, ids, **options))
        share = {"measure": "right", "features": 0, "prompts": drawn, "half": ""}
        share |= {"mean": round(len(cases) / drawn, 4), "null": "", "null_half": ""}
        for row in [share, *_rows(model, saes, graphs, config)]:
            say(
                f"{task} {row['measure']} {row['features']}: {row['mean']} ± {row['half']} "
                f"({row['null']} ± {row['null_half']})"
            )
            written.append({"task": task, **row})
        features[task] = common_features(graphs)
    machine = {name: each for name, each in results.facts("cpu").items() if name in COLUMNS}
    shared = {
        **machine, "transcoders": Path(config.transcoders).name, "model": model.name,
        "ranked_by": config.ranked_by, "prompts": config.prompts, "seed": config.seed,
        "max_features": config.max_features,
    }  # fmt: skip
    results.append(Path(config.results), [{**shared, **row} for row in written], COLUMNS)
    if config.ranked_by == "influence":
        write_json(Path(config.results).with_suffix(".json"), features)


def ranked_by_effect(
    model: Model,
    saes: Sequence[SparseAutoencoder],
    ids: Sequence[int],
    *,
    outputs: Any,
    max_features: int,
) -> Graph:
    """The features of the largest effects by gradient x activation, without edges among them."""
    wanted = outputs_of(model, ids, outputs, most=1, probability=1)
    parts, embedding = parts_of(model, saes, ids, linear=False)
    effects = estimated_effects(model, parts, ids, embedding, wanted).row()
    rows = EdgeRows(model, parts, ids, embedding, linear=False)
    count = rows.columns.features
    chosen = np.sort(np.argsort(-np.abs(effects[:count]))[:max_features])
    none = np.zeros((len(chosen), rows.columns.width), np.float32)
    graph = assemble(rows, wanted, chosen, (none, rows.into_outputs(wanted.direction)))
    own = np.concatenate([effects[chosen], effects[count:], np.zeros(len(wanted.token))])
    return replace(graph, influence=own)


def _rows(
    model: Model, saes: Sequence[SparseAutoencoder], graphs: Sequence[Graph], config: CircuitsConfig
) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"draws": config.draws, "seed": config.seed}
    curve = faithfulness(model, saes, graphs, config.counts, **options)
    found = [_row("difference of logits", 0, curve.model, curve.empty)]
    for name in ("faithfulness", "completeness"):
        for index, count in enumerate(curve.counts):
            own, null = getattr(curve, name)[:, index], getattr(curve, f"random_{name}")[:, index]
            found.append(_row(name, count, own, null))
            found.append(_pooled(f"{name}, pooled", count, own, null, curve.model - curve.empty))
    if config.ranked_by == "effect":
        return found
    for name, score in (
        ("replacement", replacement_score),
        ("completeness score", completeness_score),
    ):
        found.append(_row(name, config.max_features, np.array([score(g) for g in graphs]), None))
    return found + _agreement(model, saes, graphs, config)


def _agreement(
    model: Model, saes: Sequence[SparseAutoencoder], graphs: Sequence[Graph], config: CircuitsConfig
) -> list[dict[str, Any]]:
    """How far influence, and gradient x activation, rank features as exact ablation does."""
    rng = np.random.default_rng(config.seed)
    found: dict[str, list[tuple[float, float]]] = {}
    for graph in graphs:
        pair = [tuple(each) for each in graph.facts["outputs"]]
        outputs = outputs_of(model, graph.token_ids, pair, most=1, probability=1)
        parts, embedding = parts_of(model, saes, graph.token_ids, linear=False)
        effects = estimated_effects(model, parts, graph.token_ids, embedding, outputs)
        at = {
            (part.read, int(p), int(n)): (part, index, i)
            for i, part in enumerate(parts)
            for index, (p, n) in enumerate(zip(part.position, part.number, strict=True))
        }
        nodes = graph.nodes_of(FEATURE)
        nodes = rng.choice(nodes, min(config.ablated, len(nodes)), replace=False)
        keys = [
            (graph.sites[graph.site[n]], int(graph.position[n]), int(graph.number[n]))
            for n in nodes
        ]
        ablated = [(at[k][0].written, k[1], at[k][0].decoder[at[k][1]]) for k in keys]
        exact = ablation_effects(model, graph.token_ids, outputs, ablated, batch=16)
        gradient = np.array([effects.features[at[k][2]][at[k][1]] for k in keys])
        mixed = rng.permutation(len(keys))
        own = graph.influence[nodes]
        for name, a, b in (
            ("rank, influence", own, np.abs(exact)),
            ("rank, gradient", gradient, exact),
        ):
            found.setdefault(name, []).append((spearman(a, b), spearman(a[mixed], b)))
        large = np.abs(exact) >= np.median(np.abs(exact))
        signs = [(np.sign(g) == np.sign(exact))[large].mean() for g in (gradient, gradient[mixed])]
        found.setdefault("sign, gradient", []).append((float(signs[0]), float(signs[1])))
    return [_row(name, config.ablated, *np.array(pairs).T) for name, pairs in found.items()]


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Rank correlation, of numbers without ties."""
    ranks = np.stack([np.argsort(np.argsort(each)) for each in (a, b)])
    found: Any = np.corrcoef(ranks)
    return float(found[0, 1])


def _row(name: str, features: int, own: NDArray[Any], null: NDArray[Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"measure": name, "features": features, "null": "", "null_half": ""}
    for key, half, values in (("mean", "half", own), ("null", "null_half", null)):
        if values is not None:
            kept = np.asarray(values, float)
            spread = t_quantile(len(kept) - 1) * kept.std(ddof=1) / len(kept) ** 0.5
            row |= {key: round(float(kept.mean()), 4), half: round(float(spread), 4)}
    return row


def _pooled(
    name: str, features: int, own: NDArray[Any], null: NDArray[Any], change: NDArray[Any]
) -> dict[str, Any]:
    """Shares of each prompt's change as one share of all changes, with a ratio's interval."""
    row: dict[str, Any] = {"measure": name, "features": features}
    for key, half, shares in (("mean", "half", own), ("null", "null_half", null)):
        parts, whole = torch.tensor(shares * change), torch.tensor(change)
        row[key] = round(float(parts.sum() / whole.sum()), 4)
        row[half] = round(half_width(parts, whole) or 0.0, 4)  # None of one prompt alone
    return row


def common_features(graphs: Sequence[Graph]) -> list[dict[str, Any]]:
    """Features by the number of prompts in whose graphs they are among the 32 most influential."""
    seen: Counter[tuple[str, int]] = Counter()
    where: dict[tuple[str, int], list[str]] = {}
    for graph in graphs:
        nodes = graph.nodes_of(FEATURE)
        for node in nodes[np.argsort(-graph.influence[nodes])][:32]:
            key = graph.sites[graph.site[node]], int(graph.number[node])
            where.setdefault(key, []).append(graph.tokens[graph.position[node]])
        seen.update(
            {
                (graph.sites[graph.site[n]], int(graph.number[n]))
                for n in nodes[np.argsort(-graph.influence[nodes])][:32]
            }
        )
    return [
        {"site": site, "feature": number, "prompts": count, "at": where[site, number]}
        for (site, number), count in seen.most_common(20)
    ]


if __name__ == "__main__":
    run(CircuitsConfig, measure)
