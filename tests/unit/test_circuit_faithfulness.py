"""Faithfulness and completeness of circuits, against runs ablated by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from activations import Model, load_model
from sae.architectures.cross_layer_transcoder import CrossLayerTranscoder
from sae.circuits.attribute import circuit
from sae.circuits.faithfulness import Curve, faithfulness
from sae.circuits.graph import FEATURE, Graph
from saescope.errors import InputError
from tests.tiny import D_MODEL, N_LAYERS, make_tiny_model
from tests.unit.test_circuit import across, transcoder

PROMPTS = ("The river rose in the night", "She wrote to her brother that", "Light travels through")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = load_model(str(make_tiny_model(tmp_path_factory.mktemp("m"))), dtype="float32")
    assert isinstance(made, Model)
    return made


@pytest.fixture(scope="module")
def saes() -> list[Any]:
    found = [transcoder(layer) for layer in range(N_LAYERS)]
    for each in found:
        with torch.no_grad():
            each.W_dec.mul_(0.3)  # so that layers behind still see something of the stream
    return found


@pytest.fixture(scope="module")
def graphs(model: Model, saes: list[Any]) -> list[Graph]:
    return [circuit(model, saes, prompt, outputs=[(40, 50)]) for prompt in PROMPTS]


def by_hand(model: Model, saes: list[Any], graph: Graph, gone: Callable[[Any], bool]) -> float:
    """The difference of logits without the features (layer, position, number) that are gone."""
    seen: dict[int, torch.Tensor] = {}
    edits: dict[str, Any] = {}
    for layer, sae in enumerate(saes):

        def see(x: torch.Tensor, _: object, n=layer) -> None:
            seen[n] = x.clone()

        def change(h: torch.Tensor, _: object, n=layer, sae=sae) -> torch.Tensor:
            h = h.clone()
            for at in range(1, h.shape[1]):  # 0 is BOS
                active = sae.encode(seen[n][:, at])[0]
                for number in active.nonzero()[:, 0].tolist():
                    if gone((n, at, number)):
                        h[0, at] -= active[number] * sae.W_dec[number]
            return h

        edits |= {f"blocks.{layer}.mlp.hook_in": see, f"blocks.{layer}.hook_mlp_out": change}
    with torch.no_grad(), model.edit(edits):
        logits = model.logits(torch.tensor([graph.token_ids]))[0, -1]
    return float(logits[40] - logits[50])


def assert_ablated(
    curve: Curve,
    graph: Graph,
    counts: Sequence[int],
    logits: torch.Tensor,
    by_hand: Callable[[Callable[[Any], bool]], float],
) -> None:
    """A curve's first prompt is what `by_hand` gives without the features that are gone."""
    nodes = graph.nodes_of(FEATURE)
    ranked = nodes[np.argsort(-graph.influence[nodes], kind="stable")].tolist()
    names = [(int(graph.layer[n]), int(graph.position[n]), int(graph.number[n])) for n in ranked]
    whole, empty = float(logits[40] - logits[50]), by_hand(lambda _: True)
    assert curve.model[0] == pytest.approx(whole, abs=1e-4)
    assert curve.empty[0] == pytest.approx(empty, abs=1e-4)
    for index, count in enumerate(counts):
        kept = set(names[:count])
        alone = by_hand(lambda name, kept=kept: name not in kept)
        without = by_hand(lambda name, kept=kept: name in kept)
        shares = [(m - empty) / (whole - empty) for m in (alone, without)]
        assert curve.faithfulness[0, index] == pytest.approx(shares[0], abs=1e-3)
        assert curve.completeness[0, index] == pytest.approx(shares[1], abs=1e-3)


def test_curves_are_those_of_runs_ablated_by_hand(
    model: Model, saes: list[Any], graphs: list[Graph]
) -> None:
    graph = graphs[0]
    curve = faithfulness(model, saes, graphs[:1], [3, 20], ablation="zero", draws=2)
    logits = model.logits(torch.tensor([graph.token_ids]))[0, -1]
    assert_ablated(curve, graph, (3, 20), logits, lambda gone: by_hand(model, saes, graph, gone))


def across_by_hand(
    model: Model, sae: CrossLayerTranscoder, graph: Graph, gone: Callable[[Any], bool]
) -> float:
    """The same of a cross-layer transcoder: all that a feature writes, from its layer on, goes."""
    seen: dict[int, torch.Tensor] = {}
    edits: dict[str, Any] = {}
    size = sae.d_sae // N_LAYERS
    for layer in range(N_LAYERS):

        def see(x: torch.Tensor, _: object, n=layer) -> None:
            seen[n] = x[0].clone()

        def change(h: torch.Tensor, _: object, n=layer) -> torch.Tensor:
            h = h.clone()
            for source, at in ((s, p) for s in range(n + 1) for p in range(1, h.shape[1])):
                for number in range(size):
                    row = source * size + number
                    active = float(seen[source][at] @ sae.W_enc_T[row] + sae.b_enc[row])
                    if active > 0 and gone((source, at, number)):
                        columns = slice((n - source) * D_MODEL, (n - source + 1) * D_MODEL)
                        h[0, at] -= active * sae.decoders[source][number, columns]
            return h

        edits |= {f"blocks.{layer}.mlp.hook_in": see, f"blocks.{layer}.hook_mlp_out": change}
    with torch.no_grad(), model.edit(edits):
        logits = model.logits(torch.tensor([graph.token_ids]))[0, -1]
    return float(logits[40] - logits[50])


def test_what_a_cross_layer_transcoders_feature_writes_goes_at_all_its_layers(model: Model) -> None:
    sae = across()
    with torch.no_grad():
        for decoder in sae.decoders:
            decoder.mul_(0.3)
    graphs = [circuit(model, [sae], prompt, outputs=[(40, 50)]) for prompt in PROMPTS[:2]]
    graph = graphs[0]
    curve = faithfulness(model, [sae], graphs[:1], [3, 40], ablation="zero", draws=1)
    logits = model.logits(torch.tensor([graph.token_ids]))[0, -1]
    assert_ablated(
        curve, graph, (3, 40), logits, lambda gone: across_by_hand(model, sae, graph, gone)
    )
    # a draw of all features is all features
    means = faithfulness(model, [sae], graphs, [10_000], draws=1)
    assert means.random_faithfulness == pytest.approx(means.faithfulness)
    with pytest.raises(InputError, match="features of other SAEs"):
        faithfulness(model, [transcoder(0)], graphs, [2])


def test_all_features_that_fire_are_the_model_and_what_is_left_without_them_is_empty(
    model: Model, saes: list[Any], graphs: list[Graph]
) -> None:
    for ablation in ("zero", "mean"):
        curve = faithfulness(model, saes, graphs, [10_000], ablation=ablation, draws=1)
        if ablation == "zero":
            assert curve.faithfulness == pytest.approx(np.ones((3, 1)), abs=1e-3)
            assert curve.random_faithfulness == pytest.approx(np.ones((3, 1)), abs=1e-3)
        mean, half = curve.mean("faithfulness")
        assert mean.shape == half.shape == (1,)
        by_prompt = curve.faithfulness[:, 0]
        assert half[0] == pytest.approx(4.3027 * by_prompt.std(ddof=1) / 3**0.5, rel=1e-3, abs=1e-9)
    assert np.isnan(
        faithfulness(model, saes, graphs[:1], [1], draws=1).mean("faithfulness")[1]
    ).all()


def test_the_same_seed_draws_the_same(model: Model, saes: list[Any], graphs: list[Graph]) -> None:
    one, other, third = (
        faithfulness(model, saes, graphs[:1], [5], draws=3, seed=seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(one.random_faithfulness, other.random_faithfulness)
    assert not np.array_equal(one.random_faithfulness, third.random_faithfulness)
    assert np.array_equal(one.faithfulness, third.faithfulness)


def test_wrong_input_is_said(model: Model, saes: list[Any], graphs: list[Graph]) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "at least one graph"), (graphs, {"counts": [0]}, "counts"),
        (graphs, {"draws": 0}, "draws"), (graphs, {"ablation": "none"}, "no such ablation"),
        (graphs, {"saes": saes[:1]}, "features of other SAEs"),
    ]  # fmt: skip
    for given, options, message in cases:
        settings: dict[str, Any] = {"saes": saes, "counts": [2], **options}
        with pytest.raises(InputError, match=message):
            faithfulness(model, settings.pop("saes"), given, settings.pop("counts"), **settings)
