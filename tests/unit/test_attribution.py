"""Direct feature attribution: exact sums, numbers set by hand, and what an edit of values does."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sae
from activations import Model, load_model
from activations.models import attention
from sae.analysis.attention.attribution import Attribution
from sae.analysis.attention.sums import SITES
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.crosscoder import Crosscoder, CrosscoderConfig
from sae.architectures.gated import GatedConfig, GatedSAE
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from sae.architectures.relu import ReLUConfig, ReLUSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.normaliser import Normaliser
from saescope.errors import InputError
from tests.tiny import ARCHITECTURES, D_MODEL, make_tiny_model

TEXT = "The river rose in the night and the bridge was closed"
FEATURE, LAYER = 5, 1
RESID = f"blocks.{LAYER}.hook_resid_post"


def double(folder: Path) -> Model:
    """A model of transformers that computes in float64."""
    model = load_model(str(folder), dtype="float32")
    assert isinstance(model, Model)
    model.hf.double()
    model.dtype = torch.float64
    return model


def others() -> dict[str, Any]:
    """Configurations of further kinds of attention and of residual streams."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": D_MODEL, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
    }  # fmt: skip
    gqa = {**sizes, "num_key_value_heads": 2, "pad_token_id": 2}
    return {
        # one key-value head for all, in one projection; attention and MLP are parallel
        "falcon": transformers.FalconConfig(**sizes),
        "granite": transformers.GraniteConfig(
            **gqa, residual_multiplier=0.3, embedding_multiplier=2.0
        ),
        # norms between the heads and the stream, and of queries and keys
        "olmo2": transformers.Olmo2Config(**gqa),
        # weights that sum to less than 1
        "gpt_oss": transformers.GptOssConfig(
            **gqa, head_dim=8, num_local_experts=2, num_experts_per_tok=1
        ),
        # norms behind the sums of the stream
        "opt": transformers.OPTConfig(
            vocab_size=320, hidden_size=D_MODEL, num_hidden_layers=2, num_attention_heads=4,
            ffn_dim=48, word_embed_proj_dim=D_MODEL, do_layer_norm_before=False,
            max_position_embeddings=64,
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def other_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("others")
    for name, config in others().items():
        make_tiny_model(root / name)  # for its tokenizer
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        hf.save_pretrained(root / name)
    return {name: load_model(str(root / name), dtype="float32") for name in others()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("models")
    return {name: double(make_tiny_model(root / name, name)) for name in ARCHITECTURES}


def relu(seed: int = 0) -> ReLUSAE:
    torch.manual_seed(seed)
    made = ReLUSAE(ReLUConfig(d_sae=24), D_MODEL).eval()
    with torch.no_grad():
        made.b_enc.normal_()
        made.b_dec.normal_()
    return made.double()


def total(found: Attribution) -> float:
    """The sum of all terms but rounding."""
    others = sum(found.components.values()) + sum(found.biases.values())
    return float(found.sources.sum()) + others


def attribute(model: Model, made: Any, **options: Any) -> Attribution:
    options = {"site": RESID, "feature": FEATURE, **options}
    return sae.attribute(model, made, options.pop("text", TEXT), allow_other_model=True, **options)


@torch.no_grad()
def own_pre_activation(model: Model, made: Any, found: Attribution) -> float:
    """The SAE's own, from the activations that every other reader captures."""
    ids = torch.tensor([model.tokenize(TEXT)])
    x = model.capture(ids, [found.site])[found.site][0, found.position].double()
    return float(((x - made.b_dec) @ made.W_enc + made.b_enc)[FEATURE])


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_terms_sum_to_the_pre_activation(
    models: dict[str, Model], architecture: str, name: str
) -> None:
    model, made, site = models[architecture], relu(), f"blocks.{LAYER}.{name}"
    if (architecture, name) == ("gpt_neox", "hook_resid_mid"):
        pytest.skip("attention and MLP are parallel: there is nothing between them")
    found = attribute(model, made, site=site, position=7)
    own = own_pre_activation(model, made, found)
    assert found.pre_activation == pytest.approx(own, rel=1e-5, abs=1e-6)
    assert total(found) == pytest.approx(own, rel=1e-4, abs=1e-6)
    assert abs(found.rounding) < 1e-6
    layers = {"hook_resid_pre": [0], "hook_resid_mid": [0, 1], "hook_resid_post": [0, 1]}
    assert found.heads == [(n, h) for n in layers.get(name, [LAYER]) for h in range(4)]
    assert found.sources.shape == (len(found.heads), 8)
    stream = ["embedding", "MLP 0", *(["MLP 1"] if name == "hook_resid_post" else [])]
    assert list(found.components) == (stream if name.startswith("hook_resid") else [])
    with_bias = architecture in ("gpt2", "gpt_neox") and name != "attn.hook_z"
    assert any("output bias" in each for each in found.biases) == with_bias
    assert np.allclose(found.by_head.sum(), found.by_source.sum())


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("name", ["attn.hook_z", "hook_attn_out"])
def test_the_identity_holds_in_float32(tmp_path: Path, architecture: str, name: str) -> None:
    model = load_model(str(make_tiny_model(tmp_path, architecture)), dtype="float32")
    made, site = relu().float(), f"blocks.{LAYER}.{name}"
    found = attribute(model, made, site=site, position=7)
    x = model.capture(torch.tensor([model.tokenize(TEXT)]), [site])[site][0, 7]
    own = float(((x - made.b_dec) @ made.W_enc + made.b_enc)[FEATURE].detach())
    size = np.abs(found.sources).sum() + sum(abs(each) for each in found.biases.values())
    assert abs(total(found) - own) < 1e-5 * size
    assert size < 30  # so that the identity says something


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_source_is_worth_what_is_lost_without_its_values(
    models: dict[str, Model], architecture: str
) -> None:
    model, made, position = models[architecture], relu(), 9
    for name in ("attn.hook_z", "hook_attn_out"):
        if (architecture, name) == ("gemma2", "hook_attn_out"):
            continue  # the scale of the norm behind the heads would change too
        site, values = f"blocks.{LAYER}.{name}", f"blocks.{LAYER}.attn.hook_v"
        found = attribute(model, made, site=site, position=position)
        width = model.d_in(values)
        groups = width // 8
        assert groups == (2 if architecture in ("llama", "gemma2") else 4)
        for source, group in ((0, 0), (4, 1), (9, groups - 1)):

            def silence(x: torch.Tensor, at: torch.Tensor, s=source, g=group) -> torch.Tensor:
                x = x.clone()
                x[:, at == s, 8 * g : 8 * (g + 1)] = 0
                return x

            with model.edit({values: silence}):
                without = own_pre_activation(model, made, found)
            heads = [head for head in range(4) if head // (4 // groups) == group]
            lost = found.pre_activation - without
            assert lost == pytest.approx(found.sources[heads, source].sum(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("architecture", ["falcon", "granite", "olmo2", "gpt_oss", "opt"])
def test_other_kinds_of_attention_are_exact_or_refused(
    other_models: dict[str, Model], architecture: str
) -> None:
    model, made = other_models[architecture], relu()
    for name in ("attn.hook_z", "hook_attn_out", "hook_resid_post"):
        site = f"blocks.{LAYER}.{name}"
        if (architecture, name) == ("opt", "hook_resid_post"):
            with pytest.raises(InputError, match="not the sum of what attention and MLPs add"):
                attribute(model, made, site=site, position=7)
            continue
        found = attribute(model, made, site=site, position=7)
        own = own_pre_activation(model, made, found)
        assert total(found) == pytest.approx(own, rel=1e-4, abs=1e-5)
        assert np.abs(found.sources).max() > 1e-4


def test_weights_of_another_computation_are_refused(
    other_models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    # asked for its weights without "eager", Falcon adds a mask of 0 and 1 to its scores
    monkeypatch.setattr(attention, "_eager", lambda _: nullcontext())
    with pytest.raises(InputError, match="computes something else than the model's own"):
        attribute(other_models["falcon"], relu().float(), position=7)


def one_head(folder: Path) -> Model:
    """Attends to all positions alike; W_V = 1, W_O = 2, and an MLP that adds nothing.

    Tokens 3 and 4 are embedded as (1, 1) and (1, -1), which the first norm leaves as they are.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tiny_model(folder)
    config = LlamaConfig(
        hidden_size=2, num_hidden_layers=1, num_attention_heads=1, intermediate_size=2,
        rms_norm_eps=0.0, vocab_size=320,
    )  # fmt: skip
    hf = LlamaForCausalLM(config)
    block: Any = hf.model.layers[0]
    attention = block.self_attn
    with torch.no_grad():
        hf.model.embed_tokens.weight[3] = torch.tensor([1.0, 1.0])
        hf.model.embed_tokens.weight[4] = torch.tensor([1.0, -1.0])
        block.mlp.down_proj.weight.zero_()
        attention.q_proj.weight.zero_()
        attention.v_proj.weight.copy_(torch.eye(2))
        attention.o_proj.weight.copy_(2 * torch.eye(2))
    hf.save_pretrained(folder)
    return load_model(str(folder), dtype="float32")


def test_numbers_set_by_hand(tmp_path: Path) -> None:
    model = one_head(tmp_path)
    made = ReLUSAE(ReLUConfig(d_sae=1), 2)
    with torch.no_grad():
        made.W_enc_T.copy_(torch.tensor([[3.0, 6.0]]))
        made.b_enc.fill_(0.5)
        made.b_dec.copy_(torch.tensor([1.0, 0.0]))
    options = {"text": [3, 4, 3], "feature": 0, "position": 2}
    biases = {"SAE encoder bias": 0.5, "SAE decoder bias": -3.0}
    # a third of each value: (1, 1) W_enc = 9, (1, -1) W_enc = -3
    z = attribute(model, made, **options, site="z:0")
    assert z.sources == pytest.approx(np.array([[3, -1, 3]]), abs=1e-5)
    assert (z.components, z.biases) == ({}, pytest.approx(biases))
    assert z.pre_activation == pytest.approx(2.5, abs=1e-5)
    assert z.activation == pytest.approx(2.5, abs=1e-5)
    # W_O doubles them
    out = attribute(model, made, **options, site="attn_out:0")
    assert out.sources == pytest.approx(np.array([[6, -2, 6]]), abs=1e-5)
    assert out.pre_activation == pytest.approx(7.5, abs=1e-5)
    # and the token's own embedding is worth 9 in the stream
    post = attribute(model, made, **options, site="resid_post:0")
    assert post.sources == pytest.approx(np.array([[6, -2, 6]]), abs=1e-5)
    assert post.components == pytest.approx({"embedding": 9, "MLP 0": 0}, abs=1e-5)
    assert post.biases == pytest.approx(biases)
    assert post.pre_activation == pytest.approx(16.5, abs=1e-5)
    assert (post.heads, post.token_ids, len(post.tokens)) == ([(0, 0)], [3, 4, 3], 3)


def test_the_strongest_position_is_chosen_and_scales_are_folded(models: dict[str, Model]) -> None:
    model, made = models["llama"], relu(3).float()
    made.normaliser = Normaliser("centred", torch.randn(D_MODEL), torch.tensor(0.5), 1.0)
    with torch.no_grad():
        made.b_enc[FEATURE] = 30.0  # so that it fires
    ids = torch.tensor([model.tokenize(TEXT)])
    x = model.capture(ids, [RESID])[RESID][0].float()
    found = attribute(model, made)
    mine = made.encode(x)[:, FEATURE].detach()
    assert found.position == 1 + int(mine[1:].argmax())
    assert found.activation == pytest.approx(float(mine[found.position]), rel=1e-5)
    assert total(found) == pytest.approx(float(mine[found.position]), rel=1e-4)


def test_a_scale_of_each_row_multiplies_the_biases(models: dict[str, Model]) -> None:
    model, made = models["llama"], relu(4).float()
    made.normaliser = Normaliser("standardised", torch.zeros(D_MODEL), torch.ones(()), 1.0)
    with torch.no_grad():
        made.b_enc[FEATURE] = 30.0
    found = attribute(model, made, position=6)
    x = model.capture(torch.tensor([model.tokenize(TEXT)]), [RESID])[RESID][0, 6].float()
    scale = float(x.std(correction=0)) + 1e-5
    assert found.biases["SAE encoder bias"] == pytest.approx(30 * scale, rel=1e-5)
    assert total(found) == pytest.approx(float(made.encode(x[None])[0, FEATURE].detach()), rel=1e-4)


@pytest.mark.parametrize(
    "made",
    [
        GatedSAE(GatedConfig(d_sae=24), D_MODEL),
        JumpReLUSAE(JumpReLUConfig(d_sae=24, initial_threshold=0.01), D_MODEL),
        TopKSAE(TopKConfig(d_sae=24, k=4), D_MODEL),
        AbsTopKSAE(AbsTopKConfig(d_sae=24, k=4), D_MODEL),
    ],
    ids=["gated", "jumprelu", "topk", "abstopk"],
)
def test_where_a_feature_fires_the_terms_sum_to_its_activation(
    models: dict[str, Model], made: Any
) -> None:
    model = models["gpt2"]
    torch.manual_seed(1)
    made.reset_parameters()
    with torch.no_grad():
        for each in (made.b_dec, getattr(made, "r_mag", torch.empty(0))):
            each.normal_()
    x = model.capture(torch.tensor([model.tokenize(TEXT)]), [RESID])[RESID][0].float()
    codes = made.encode(x).detach()
    position, feature = (codes[1:].abs() == codes[1:].abs().max()).nonzero()[0].tolist()
    value = float(codes[position + 1, feature])
    found = attribute(model, made, feature=feature, position=position + 1)
    assert value != 0
    assert found.activation == pytest.approx(value, rel=1e-4)
    assert total(found) == pytest.approx(value, rel=1e-4)
    other = found.negated()
    assert (total(other), other.activation) == pytest.approx((-value, -value), rel=1e-4)
    assert other.rounding == -found.rounding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": f"blocks.{LAYER}.hook_mlp_out"}, r"no sum over .*allowed: blocks\.N\.attn\.hook"),
        ({"position": 0}, "neither a text's first token"),
        ({"position": 999}, "position"),
        ({"feature": 24}, "feature"),
        ({"text": ""}, "the text is empty"),
        ({"text": [3, 10**6]}, "text"),
        ({"text": [3]}, "has no other"),
        ({"text": [3] * 65}, "positions"),
    ],
)
def test_what_cannot_be_taken_apart(
    models: dict[str, Model], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        attribute(models["llama"], relu(), **options)


def test_other_saes_and_models_are_refused(models: dict[str, Model]) -> None:
    model = models["llama"]
    pursuit = MatchingPursuitSAE(MatchingPursuitConfig(d_sae=24, k=4), D_MODEL)
    with pytest.raises(InputError, match=r"one after another.*matching_pursuit"):
        attribute(model, pursuit)
    crosscoder = Crosscoder(CrosscoderConfig(d_sae=24), 2 * D_MODEL)
    with pytest.raises(InputError, match="a crosscoder reads several sites"):
        attribute(model, crosscoder)
    with pytest.raises(InputError, match="only a language model's"):
        attribute("a name", relu())  # type: ignore[arg-type]


def test_other_sums_are_refused(models: dict[str, Model]) -> None:
    model, z = models["llama"], f"blocks.{LAYER}.attn.hook_z"
    with (
        model.edit({z: lambda x, _: 2 * x}),
        pytest.raises(InputError, match=r"layer 1: heads are not their pattern times"),
    ):
        attribute(model, relu(), site=z, position=3)
    with (
        model.edit({"blocks.0.hook_resid_post": lambda x, _: x + 1}),
        pytest.raises(InputError, match="not the sum of what attention and MLPs add"),
    ):
        attribute(model, relu(), position=3)


def test_the_models_own_attention_is_back_afterwards(models: dict[str, Model]) -> None:
    model = models["llama"]
    before = model.hf.config._attn_implementation
    assert before != "eager"
    attribute(model, relu(), position=3)
    assert model.hf.config._attn_implementation == before
