"""Recursive attribution: every node's children sum to it, and numbers that an edit confirms."""

from pathlib import Path
from typing import Any

import pytest
import torch

from activations import Model, load_model
from activations.models import attention_values
from activations.models.attention import run_with_patterns
from activations.models.attention_values import ValueMap
from sae.analysis.attention import Node, attribute, attribute_recursively
from sae.architectures.relu import ReLUConfig, ReLUSAE
from sae.core.normaliser import Normaliser
from saescope.errors import InputError
from tests.tiny import ARCHITECTURES, D_MODEL, make_tiny_model

TEXT = "The river rose in the night and the bridge was closed"
FEATURE, AT = 5, 9
Z, PRE, POST = "blocks.2.attn.hook_z", "blocks.2.hook_resid_pre", "blocks.1.hook_resid_post"
EARLIER = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: load_model(str(make_tiny_model(root / name, name)), dtype="float32")
        for name in ARCHITECTURES
    }


def relu(site: str, seed: int = 0) -> ReLUSAE:
    torch.manual_seed(seed)
    made = ReLUSAE(ReLUConfig(d_sae=24), D_MODEL).eval()
    with torch.no_grad():
        made.b_enc.normal_()
        made.b_dec.normal_()
    made.metadata = {"site": site}
    return made


def recursive(model: Model, made: Any, **options: Any) -> Node:
    options = {"feature": FEATURE, "position": AT, "upstream": [relu(PRE, 1)], **options}
    text = options.pop("text", TEXT)
    return attribute_recursively(model, made, text, allow_other_model=True, **options)


def off_by(node: Node) -> float:
    """The largest difference, of any node, to its children's sum, over the sum of their sizes."""
    worst = 0.0
    for each in node.walk():
        if each.children:
            size = sum(abs(child.value) for child in each.children)
            found = abs(sum(child.value for child in each.children) - each.value)
            worst = max(worst, found / size if size else found)
    return worst


@pytest.mark.parametrize("site", [Z, "blocks.2.hook_attn_out"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_children_sum_to_their_node(models: dict[str, Model], architecture: str, site: str) -> None:
    model, made = models[architecture], relu(site)
    root = recursive(model, made, top=32)
    assert off_by(root) < 1e-5
    whole = attribute(model, made, TEXT, FEATURE, AT, allow_other_model=True)
    assert root.value == pytest.approx(whole.pre_activation, rel=1e-6)
    heads = [node for node in root.children if node.kind == "head"]
    assert len(heads) == 32
    for node in heads:
        number = int(node.name.rpartition(".")[2])
        assert node.value == pytest.approx(whole.sources[number, node.position], rel=1e-6)
        kinds = {child.kind for child in node.children}
        read = node.position > 0
        kinds_here = {"feature", "rest", "error", "bias"} if read else {"stream", "bias"}
        assert kinds == kinds_here
    assert {node.position for node in heads} > {0}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_a_feature_at_a_source_is_worth_what_is_lost_without_it(
    models: dict[str, Model], architecture: str
) -> None:
    # take what one upstream feature writes off the norm's input, the norm's scale held as it was:
    # by hand, through the model's own modules
    model, made, stream = models[architecture], relu(Z), relu(PRE, 1)
    root = recursive(model, made, upstream=[stream], top=100)
    ids = model.tokenize(TEXT)
    x = model.capture(torch.tensor([ids]), [PRE])[PRE][0].double()
    norm: Any = model.site_map.target("blocks.2.ln1.hook_out").module
    run = run_with_patterns(model, ids, ["blocks.2.attn.hook_v"])
    target = model.site_map.target("blocks.2.attn.hook_v")
    checked = 0
    for node in root.children:
        for child in node.children:
            if child.kind != "feature" or abs(child.value) < 1e-3 or checked > 20:
                continue
            assert child.feature is not None
            assert child.activation is not None
            s, head = node.position, int(node.name.rpartition(".")[2])
            written = child.activation * stream.W_dec[child.feature].detach().double()
            centred = isinstance(norm, torch.nn.LayerNorm)
            if centred:
                written = written - written.mean()
                scale = (x[s].var(correction=0) + norm.eps) ** -0.5
            else:
                scale = (x[s].square().mean() + norm.variance_epsilon) ** -0.5
            moved = (written * scale * norm.weight.detach().double()).float()
            with torch.no_grad():
                values = target.module(torch.stack([moved, torch.zeros_like(moved)])[None])
                values = target.read(values, (1, 2))[0].double()
            size, groups = D_MODEL // 4, len(values[0]) // (D_MODEL // 4)
            own = (values[0] - values[1]).view(groups, size)[head // (4 // groups)]
            direction = made.W_enc_T[FEATURE].detach().double().view(4, size)[head]
            weight = run.pattern[2][head, AT, s]
            assert child.value == pytest.approx(float(weight * (own @ direction)), rel=1e-3)
            checked += 1
    assert checked > 5


def test_features_are_taken_apart_in_turn(models: dict[str, Model]) -> None:
    model = models["llama"]
    saes = [relu(POST, 1), relu(EARLIER, 2)]  # POST is what layer 2 reads, as PRE is
    root = recursive(model, relu(Z), upstream=saes, depth=2, top=3)
    assert off_by(root) < 1e-5
    second = [node for node in root.walk() if node.site == POST]
    assert second
    assert all(node.children for node in second if node.value)
    third = [node for node in root.walk() if node.site == EARLIER]
    assert third
    assert not any(node.children for node in third)
    for node in second:
        whole = attribute(
            model, saes[0], TEXT, node.feature or 0, node.position, allow_other_model=True
        )
        assert node.activation == pytest.approx(whole.activation, rel=1e-4)
        names = {child.name for child in node.children}
        assert {"embedding", "MLP 0", "MLP 1", "SAE encoder bias"} <= names
    once = recursive(model, relu(Z), upstream=saes, depth=1, top=3)
    assert not [node for node in once.walk() if node.site == EARLIER]
    alike = recursive(model, relu(Z), upstream=[relu(PRE, 1)], depth=1, top=3)
    values = [[node.value for node in each.walk()] for each in (once, alike)]
    assert values[0] == pytest.approx(values[1])


def test_top_keeps_the_largest(models: dict[str, Model]) -> None:
    model, made = models["gpt2"], relu(Z)
    few, all_ = (recursive(model, made, top=n) for n in (2, 1000))
    shown = [node for node in few.children if node.kind == "head"]
    every = [abs(node.value) for node in all_.children if node.kind == "head"]
    assert [abs(node.value) for node in shown] == sorted(every, reverse=True)[:2]
    assert len(every) == 4 * (AT + 1)
    assert all_.children[len(every)].value == 0  # nothing is left over
    assert few.value == all_.value


def test_what_is_refused(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = models["llama"], relu(Z)
    with pytest.raises(InputError, match=r"reads the residual stream between.*hook_resid_post"):
        recursive(model, made, upstream=[relu("blocks.1.attn.hook_z")])
    with pytest.raises(InputError, match="two SAEs of what layer 2 reads"):
        recursive(model, made, upstream=[relu(PRE), relu(POST)])
    rows = relu(PRE)
    rows.normaliser = Normaliser("standardised", torch.zeros(D_MODEL), torch.ones(()), 1.0)
    with pytest.raises(InputError, match="a normaliser of each row"):
        recursive(model, made, upstream=[rows])
    with pytest.raises(InputError, match="depth"):
        recursive(model, made, depth=0)
    own = attention_values._projection
    monkeypatch.setattr(
        attention_values, "_projection", lambda *given: (2 * own(*given)[0], own(*given)[1])
    )
    with pytest.raises(InputError, match="through one norm and one matrix"):
        recursive(model, made)


def test_values_of_a_block_without_a_norm_before_attention(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Olmo2Config

    make_tiny_model(tmp_path)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(
        Olmo2Config(
            vocab_size=320, hidden_size=D_MODEL, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
            pad_token_id=2,
        )
    )  # fmt: skip
    hf.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="float32")
    assert isinstance(model, Model)
    run = run_with_patterns(model, model.tokenize(TEXT), ValueMap.needed(model, 1))
    found = ValueMap.of(model, run, 1)
    assert found.scale.tolist() == [1.0] * len(found.scale)
    made = found.linear(run.at["blocks.1.hook_resid_pre"], range(len(found.scale)))
    assert torch.allclose(made + found.constant, run.at["blocks.1.attn.hook_v"], atol=1e-5)
