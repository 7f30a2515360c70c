"""Attribution graphs of tiny models: sums that must be exact, and edges against edited runs."""

from typing import Any

import numpy as np
import pytest
import torch

from activations import Model, load_model
from activations.models.frozen import frozen
from sae.architectures.cross_layer_transcoder import (
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
)
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from sae.architectures.skip_transcoder import SkipTranscoder, SkipTranscoderConfig
from sae.architectures.transcoder import Transcoder, TranscoderConfig
from sae.circuits.attribute import circuit
from sae.circuits.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Graph
from sae.data.provenance import weights_hash
from saescope.errors import InputError
from tests.tiny import ARCHITECTURES, D_MODEL, N_LAYERS, make_tiny_model

TEXT = "The river rose in the night and the bridge"
D_SAE = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("models")
    made = {
        name: load_model(str(make_tiny_model(root / name, name)), dtype="float32")
        for name in ARCHITECTURES
    }
    assert all(isinstance(each, Model) for each in made.values())
    return made


def transcoder(layer: int, *, skip: bool = False, **fields: Any) -> Transcoder | SkipTranscoder:
    torch.manual_seed(layer)
    settings: dict[str, Any] = {"d_sae": D_SAE, "k": 4, **fields}
    if skip:
        made: Any = SkipTranscoder(SkipTranscoderConfig(**settings), D_MODEL)
    else:
        made = Transcoder(TranscoderConfig(**settings), D_MODEL)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    made.metadata |= {
        "site": f"blocks.{layer}.mlp.hook_in",
        "target_site": f"blocks.{layer}.hook_mlp_out",
    }
    return made.eval()


def transcoders(**fields: Any) -> list[Any]:
    return [transcoder(layer, **fields) for layer in range(N_LAYERS)]


def sums(graph: Graph) -> np.ndarray:
    return graph.adjacency.sum(1, dtype=np.float64) + graph.bias


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *((each, "topk") for each in ARCHITECTURES),
        ("llama", "relu"),
        ("gpt2", "skip"),
        ("llama", "normalised"),
    ],
)
def test_what_a_node_gets_adds_up_to_what_it_has(
    models: dict[str, Model], architecture: str, kind: str
) -> None:
    fields: dict[str, Any] = {"skip": True} if kind == "skip" else {"activation": kind}
    saes = transcoders() if kind == "normalised" else transcoders(**fields)
    if kind == "normalised":  # found by a call of the norm, which must not be what is held
        for layer, each in enumerate(saes):
            each.metadata["site"] = f"blocks.{layer}.ln2.hook_normalized"
    graph = circuit(models[architecture], saes, TEXT)
    targets = np.isin(graph.kind, (FEATURE, LOGIT))
    assert (graph.kind == FEATURE).sum() > 50
    scale = np.abs(graph.adjacency).sum(1)[targets] + np.abs(graph.bias[targets])
    off = np.abs(sums(graph) - graph.value)[targets]
    assert (off / scale).max() < 1e-5
    assert np.abs(graph.bias[targets]).max() > 1e-3  # biases have a share of their own
    assert not graph.adjacency[~targets].any()  # nothing flows into errors and tokens
    # of a later position, or a later layer, nothing comes
    target, source, _ = graph.edges()
    assert (graph.position[source] <= graph.position[target]).all()
    assert (graph.layer[source] < graph.layer[target]).all()


def across(activation: str = "relu") -> CrossLayerTranscoder:
    torch.manual_seed(5)
    settings: Any = {"d_sae": D_SAE * N_LAYERS, "layers": N_LAYERS, "activation": activation}
    settings["k"] = 5
    wide = D_MODEL * N_LAYERS
    made = CrossLayerTranscoder(CrossLayerTranscoderConfig(**settings), wide, wide)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    made.metadata |= {
        "sites": [f"blocks.{layer}.mlp.hook_in" for layer in range(N_LAYERS)],
        "target_sites": [f"blocks.{layer}.hook_mlp_out" for layer in range(N_LAYERS)],
    }
    return made.eval()


@pytest.mark.parametrize(("architecture", "activation"), [("llama", "relu"), ("gpt_neox", "topk")])
def test_features_that_write_at_several_layers_add_up(
    models: dict[str, Model], architecture: str, activation: str
) -> None:
    model, made = models[architecture], across(activation)
    graph = circuit(model, [made], TEXT)
    targets = np.isin(graph.kind, (FEATURE, LOGIT))
    scale = np.abs(graph.adjacency).sum(1) + np.abs(graph.bias)
    assert (np.abs(sums(graph) - graph.value)[targets] / scale[targets]).max() < 1e-5
    # errors are what the whole transcoder leaves over at each layer
    tokens = torch.tensor([graph.token_ids])
    sites = [*made.metadata["sites"], *made.metadata["target_sites"]]
    found = model.capture(tokens, sites)
    x, t = (torch.cat([found[site][0] for site in half], 1) for half in (sites[:3], sites[3:]))
    left = (t - made(x).x_hat).view(len(x), N_LAYERS, D_MODEL).norm(dim=2)
    errors = graph.nodes_of(ERROR)
    kept = model.keep_mask(tokens)[0].numpy()[graph.position[errors]]
    own = left[graph.position[errors], graph.layer[errors]].detach().numpy()
    assert graph.activation[errors][kept] == pytest.approx(own[kept], rel=1e-4)


def test_an_edge_is_what_is_lost_without_its_source(models: dict[str, Model]) -> None:
    # written without the library's own cuts: a run with everything held, in which one feature's
    # part of one MLP's output is taken away, and MLPs behind it write what they wrote
    model, saes = models["llama"], transcoders()
    graph = circuit(model, saes, TEXT)
    tokens = torch.tensor([model.tokenize(TEXT)])
    written = [f"blocks.{layer}.hook_mlp_out" for layer in range(N_LAYERS)]
    found = model.capture(tokens, written)
    source = int(graph.nodes_of(FEATURE)[graph.layer[graph.nodes_of(FEATURE)] == 0][7])
    lost = torch.zeros_like(found[written[0]])
    decoder = saes[0].W_dec[graph.number[source]].detach()
    lost[0, graph.position[source]] = float(graph.activation[source]) * decoder

    def read(held: Any, removed: torch.Tensor) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        edits: dict[str, Any] = {
            site: lambda x, _, site=site: found[site] - (removed if site == written[0] else 0)
            for site in written
        }
        for site in ("blocks.1.mlp.hook_in", "blocks.2.mlp.hook_in", "ln_final.hook_out"):
            edits[site] = lambda x, _, site=site: seen.update({site: x.clone()})
        with torch.no_grad(), model.edit(edits):
            held.run(tokens)
        return seen

    with frozen(model) as held:
        before = read(held, torch.zeros_like(lost))
        after = read(held, lost)
    targets, weights = graph.outgoing(source)
    assert len(targets) > 20
    w_u = model.unembedding()[0]
    for target, weight in zip(targets.tolist(), weights.tolist(), strict=True):
        number, layer = int(graph.number[target]), int(graph.layer[target])
        if graph.kind[target] == LOGIT:
            site, direction = "ln_final.hook_out", w_u[:, number] - w_u.mean(1)
        else:
            site, direction = f"blocks.{layer}.mlp.hook_in", saes[layer].W_enc[:, number].detach()
        change = (before[site] - after[site])[0, graph.position[target]]
        assert float(change @ direction) == pytest.approx(weight, rel=1e-3, abs=1e-5)


def test_logits_are_the_likeliest_up_to_a_probability(models: dict[str, Model]) -> None:
    model = models["gpt_neox"]
    ids = model.tokenize(TEXT)
    logits = model.logits(torch.tensor([ids]))[0, -1]
    likely = logits.softmax(0).sort(descending=True)
    reached = float(likely.values[:4].sum())
    options: dict[str, Any] = {"max_features": 1}
    graph = circuit(model, transcoders(), TEXT, probability=reached - 1e-4, **options)
    rows = graph.nodes_of(LOGIT)
    assert graph.number[rows].tolist() == likely.indices[:4].tolist()
    assert graph.weight[rows] == pytest.approx(likely.values[:4].numpy(), rel=1e-4)
    centred = logits - logits.mean()
    assert graph.value[rows] == pytest.approx(centred[likely.indices[:4]].numpy(), rel=1e-3)
    assert len(circuit(model, transcoders(), TEXT, **options).nodes_of(LOGIT)) == 10
    three = circuit(model, transcoders(), ids, max_outputs=3, **options)
    assert len(three.nodes_of(LOGIT)) == 3


def test_outputs_can_be_chosen_and_subtracted(models: dict[str, Model]) -> None:
    model = models["gpt2"]
    options: dict[str, Any] = {"max_features": 5, "batch": 2}
    one = circuit(model, transcoders(), TEXT, outputs=[7], **options)
    word = model.token_strings([9])[0]
    other = circuit(model, transcoders(), TEXT, outputs=[word], **options)
    both = circuit(model, transcoders(), TEXT, outputs=[(7, word)], **options)
    ends = [graph.adjacency[-1, graph.nodes_of(EMBEDDING)] for graph in (one, other, both)]
    assert np.abs(ends[2]).max() > 1e-3
    assert ends[2] == pytest.approx(ends[0] - ends[1], abs=1e-5)
    assert both.value[-1] == pytest.approx(one.value[-1] - other.value[-1], abs=1e-4)
    assert both.weight[-1] == 1
    assert one.weight[-1] == one.activation[-1] < 1
    named = f"{model.token_strings([7])[0]} - {word}"
    assert both.describe(len(both) - 1).startswith(f"output {named!r}")


def test_a_cap_keeps_the_most_influential_and_the_sums(models: dict[str, Model]) -> None:
    model = models["llama"]
    whole = circuit(model, transcoders(), TEXT)
    small = circuit(model, transcoders(), TEXT, max_features=12, batch=3)
    count = len(whole.nodes_of(FEATURE))
    assert (small.facts["active_features"], small.facts["left_out"]) == (count, count - 12)
    assert len(small.nodes_of(FEATURE)) == 12
    ranked = np.array(whole.ids)[np.argsort(-whole.influence * (whole.kind == FEATURE))]
    assert set(ranked[:6]) <= set(small.ids)
    targets = np.isin(small.kind, (FEATURE, LOGIT))
    scale = np.abs(small.adjacency).sum(1) + np.abs(small.bias)
    assert (np.abs(sums(small) - small.value)[targets] / scale[targets]).max() < 1e-5
    # edges between what both have are the same; what was left out is with the errors
    index = [whole.index(name) for name in small.ids]
    kept = small.kind != ERROR
    same = whole.adjacency[np.ix_(index, index)]
    assert small.adjacency[:, kept] == pytest.approx(same[:, kept], abs=1e-5)
    assert np.abs(small.adjacency[:, ~kept] - same[:, ~kept]).max() > 1e-2


def test_what_nothing_reads_is_error_or_bias(models: dict[str, Model]) -> None:
    model = models["llama"]  # its BOS is read by no SAE
    with_errors = circuit(model, transcoders(), TEXT)
    without = circuit(model, transcoders(), TEXT, unread_errors=False)
    first = with_errors.position == 0
    assert not (first & (with_errors.kind == FEATURE)).any()
    errors = first & (with_errors.kind == ERROR)
    assert np.abs(with_errors.adjacency[:, errors]).max() > 1e-3
    assert not without.adjacency[:, errors].any()
    targets = np.isin(without.kind, (FEATURE, LOGIT))
    assert sums(without)[targets] == pytest.approx(without.value[targets], abs=1e-3)
    added = with_errors.adjacency[:, errors].sum(1)
    assert without.bias == pytest.approx(with_errors.bias + added, abs=1e-4)


def test_some_layers_alone_can_have_transcoders(models: dict[str, Model]) -> None:
    alone = transcoder(1)
    graph = circuit(models["gemma2"], [alone], TEXT)
    # by which the explorer knows its feature store
    assert graph.facts["sae_hashes"] == ["", weights_hash(alone), ""]
    assert set(graph.layer[graph.nodes_of(FEATURE)].tolist()) == {1}
    assert set(graph.layer[graph.nodes_of(ERROR)].tolist()) == {0, 1, 2}
    targets = np.isin(graph.kind, (FEATURE, LOGIT))
    assert sums(graph)[targets] == pytest.approx(graph.value[targets], abs=1e-3)


def test_the_model_is_itself_afterwards(models: dict[str, Model]) -> None:
    model, tokens = models["gpt2"], torch.tensor([[5, 6, 7]])
    before, kind = model.logits(tokens), model.hf.config._attn_implementation
    shorter = model.edit({"blocks.1.hook_mlp_out": lambda x, _: x[:, 1:]})
    with pytest.raises(InputError, match="shape"), frozen(model) as held, shorter:
        held.run(tokens)
    circuit(model, [transcoder(0)], TEXT, max_features=1)
    assert model.hf.config._attn_implementation == kind
    assert torch.equal(model.logits(tokens), before)


def test_wrong_input_is_said(models: dict[str, Model]) -> None:
    model = models["llama"]
    pursuit = MatchingPursuitSAE(MatchingPursuitConfig(d_sae=8, k=4), D_MODEL)
    pursuit.metadata["site"] = "blocks.1.hook_resid_post"
    twice = [transcoder(0), transcoder(0)]
    scaled = JumpReLUSAE(JumpReLUConfig(d_sae=8), D_MODEL + 1)
    scaled.metadata["site"] = "blocks.1.hook_resid_post"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (TEXT, {"saes": []}, "at least one"), ("", {}, "prompt is empty"), ([], {}, "empty"),
        ([999], {}, "prompt: out of range"), (TEXT, {"outputs": [999]}, "outputs: out of range"),
        (TEXT, {"outputs": ["river rose"]}, "is not one token"), (TEXT, {"outputs": []}, "one"),
        (TEXT, {"outputs": [(1, 2), 1]}, "comes first twice"),
        (TEXT, {"outputs": [(1, 2, 3)]}, "of two tokens"), (TEXT, {"batch": 0}, "batch"),
        (TEXT, {"max_features": 0}, "max_features"), (TEXT, {"probability": 0}, "probability"),
        (TEXT, {"saes": twice}, "write at one site"), (TEXT, {"saes": [pursuit]}, "one after"),
        (TEXT, {"saes": [scaled]}, "width differs"),
    ]  # fmt: skip
    for prompt, options, message in cases:
        given = {"saes": [transcoder(0)], **options}
        with pytest.raises(InputError, match=message):
            circuit(model, given.pop("saes"), prompt, **given)
