"""Effects of nodes of a tiny model: gradients against exact ablation, and graphs of SAEs."""

from typing import Any

import numpy as np
import pytest
import torch

from activations import Model, load_model
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.circuits.attribute import circuit, parts_of
from sae.circuits.effects import ablation_effects, estimated_effects, run_measured
from sae.circuits.graph import EMBEDDING, ERROR, FEATURE, LOGIT
from sae.circuits.outputs import Outputs, outputs_of
from sae.circuits.parts import Part
from sae.circuits.pruning import prune
from saescope.errors import InputError
from tests.tiny import D_MODEL, N_LAYERS, make_tiny_model
from tests.unit.test_circuit import TEXT, transcoders

SITES = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = load_model(str(make_tiny_model(tmp_path_factory.mktemp("m"))), dtype="float32")
    assert isinstance(made, Model)
    return made


def saes() -> list[TopKSAE]:
    found = []
    for layer in range(N_LAYERS):
        for number, site in enumerate(SITES):
            torch.manual_seed(10 * layer + number)
            made = TopKSAE(TopKConfig(d_sae=64, k=8), D_MODEL).eval()
            made.metadata["site"] = f"blocks.{layer}.{site}"
            found.append(made)
    return found


def taken_apart(model: Model) -> tuple[list[int], Outputs, list[Part], Any]:
    ids = model.tokenize(TEXT)
    outputs = outputs_of(model, ids, [(40, 50)], most=1, probability=1)
    parts, embedding = parts_of(model, saes(), ids, linear=False)
    return ids, outputs, parts, embedding


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = np.stack([np.argsort(np.argsort(each)) for each in (a, b)])
    found: Any = np.corrcoef(ranks)
    return float(found[0, 1])


def test_ablation_is_the_loss_of_the_node(model: Model) -> None:
    ids, outputs, parts, _ = taken_apart(model)
    part = parts[4]
    nodes = [(part.written, int(part.position[n]), part.decoder[n]) for n in range(5)]
    found = ablation_effects(model, ids, outputs, nodes, batch=2)
    logits = model.logits(torch.tensor([ids]))[0, -1]
    for (site, at, vector), effect in zip(nodes, found, strict=True):

        def without(x: torch.Tensor, position: torch.Tensor, at=at, v=vector) -> torch.Tensor:
            return x - (position == at)[None, :, None] * v

        with model.edit({site: without}):
            lost = logits - model.logits(torch.tensor([ids]))[0, -1]
        assert effect == pytest.approx(float(lost[40] - lost[50]), abs=1e-5)
    assert np.abs(found).max() > 1e-4
    clean = run_measured(model, ids, outputs, {})
    assert float(clean) == pytest.approx(float(logits[40] - logits[50]), abs=1e-5)


def test_gradients_agree_with_ablation_in_sign_and_rank(model: Model) -> None:
    ids, outputs, parts, embedding = taken_apart(model)
    last = max(part.read for part in parts)
    chosen = [(i, n) for i, part in enumerate(parts) for n in range(0, len(part.number), 7)]
    exact = ablation_effects(
        model,
        ids,
        outputs,
        [(parts[i].written, int(parts[i].position[n]), parts[i].decoder[n]) for i, n in chosen],
    )
    assert last == "blocks.2.hook_resid_post"
    assert len(chosen) > 100
    for estimate in ("gradient", "integrated"):
        found = estimated_effects(model, parts, ids, embedding, outputs, estimate)
        own = np.array([found.features[i][n] for i, n in chosen])
        assert spearman(own, exact) > 0.9
        large = np.abs(exact) > np.median(np.abs(exact))
        assert (np.sign(own) == np.sign(exact))[large].mean() > 0.9
    shuffled = np.random.default_rng(0).permutation(exact)
    assert abs(spearman(own, shuffled)) < 0.3  # what agreement by chance is


def test_integrated_gradients_add_up_along_the_way(model: Model) -> None:
    # a site's effects are together what m loses when all that its nodes write is gone; not at
    # sites of the stream itself, whose way begins at a stream of zero, where norms have no slope
    ids, outputs, parts, embedding = taken_apart(model)
    found = estimated_effects(model, parts, ids, embedding, outputs, "integrated", steps=20)
    clean = run_measured(model, ids, outputs, {})
    beside = [i for i, part in enumerate(parts) if not part.read.endswith("hook_resid_post")]
    assert len(beside) == 2 * N_LAYERS
    for index in beside:
        part = parts[index]
        edit = {part.written: lambda x, _, c=part.constant: c[None].to(x)}
        lost = float(clean - run_measured(model, ids, outputs, edit))
        together = float(found.features[index].sum() + found.errors[index].sum())
        assert together == pytest.approx(lost, rel=0.01, abs=1e-3)


@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_saes_of_several_sites_make_a_graph(model: Model, method: Any) -> None:
    graph = circuit(model, saes(), TEXT, method=method, outputs=[(40, 50)], max_features=60)
    assert graph.method == method
    assert len(graph.nodes_of(FEATURE)) == 60
    assert len(graph.nodes_of(ERROR)) == len(graph.sites) * len(graph.tokens)
    ids, outputs, parts, embedding = taken_apart(model)
    every = estimated_effects(model, parts, ids, embedding, outputs, method)
    total = every.row().sum()
    assert graph.influence.sum() == pytest.approx(total, rel=1e-4)
    largest = np.sort(np.abs(np.concatenate(every.features)))[-60:]
    nodes = graph.nodes_of(FEATURE)
    assert np.sort(np.abs(graph.influence[nodes])) == pytest.approx(largest, rel=1e-4)
    assert (graph.influence[nodes] < 0).any()  # some speak against the output
    target, source, weight = graph.edges()
    assert np.isfinite(weight).all()
    # nothing goes around a residual SAE: from before it, edges end at the next one's features
    late = graph.layer[target] == graph.n_layers
    assert set(np.array(graph.sites)[graph.site[source[late]]]) == {"blocks.2.hook_resid_post"}
    assert set(graph.kind[target]) <= {FEATURE, LOGIT}
    assert len(graph.nodes_of(EMBEDDING)) == len(graph.tokens)
    small = prune(graph, nodes=0.5)
    assert 0 < len(small.nodes_of(FEATURE)) < 60


def test_an_edge_of_gradients_is_a_small_change(model: Model) -> None:
    # from a feature of layer 0's attention to the residual stream behind it, by finite differences
    graph = circuit(model, saes(), TEXT, method="gradient", max_features=300)
    ids = model.tokenize(TEXT)
    _, _, parts, _ = taken_apart(model)
    part = next(each for each in parts if each.written == "blocks.0.hook_attn_out")
    n = 9
    source = graph.index(f"0@hook_attn_out_{int(part.number[n])}_{int(part.position[n])}")
    step, written = 1e-3, model.capture(torch.tensor([ids]), ["blocks.0.hook_mlp_out"])

    def moved(scale: float) -> torch.Tensor:
        def change(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[0, part.position[n]] += scale * part.decoder[n]
            return x

        held = {"blocks.0.hook_mlp_out": lambda x, _: written["blocks.0.hook_mlp_out"]}
        with model.edit({"blocks.0.hook_attn_out": change, **held}):
            return model.capture(torch.tensor([ids]), ["blocks.0.hook_resid_post"])[
                "blocks.0.hook_resid_post"
            ][0]

    slope = (moved(step) - moved(-step)) / (2 * step)
    sae = next(s for s in saes() if s.metadata["site"] == "blocks.0.hook_resid_post")
    checked = 0
    targets, weights = graph.outgoing(source)
    for target, weight in zip(targets.tolist(), weights.tolist(), strict=True):
        if graph.sites[graph.site[target]] == "blocks.0.hook_resid_post":
            direction = sae.W_enc[:, graph.number[target]].detach()
            expected = float(slope[graph.position[target]] @ direction)
            assert weight == pytest.approx(expected, rel=2e-2, abs=2e-3)
            checked += 1
    assert checked >= 3


def test_methods_and_steps_are_checked(model: Model) -> None:
    with pytest.raises(InputError, match="no such method"):
        circuit(model, transcoders(), TEXT, method="magic")  # type: ignore[arg-type]
    ids, outputs, parts, embedding = taken_apart(model)
    with pytest.raises(InputError, match="steps"):
        estimated_effects(model, parts, ids, embedding, outputs, "integrated", steps=0)
