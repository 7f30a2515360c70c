"""Architectures that differ from the usual: what each site is, against the model's own modules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from activations import Model, load_model
from activations.sites.hf_facts import longest_text
from activations.sites.probe import AFTER, PARALLEL, SEQUENTIAL
from saescope.errors import InputError
from tests.sweep_architectures import causal, sweep

SHARED: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 300,
}  # fmt: skip
ROTARY = {
    **SHARED,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPT: dict[str, Any] = {**SHARED, "ffn_dim": 48, "max_position_embeddings": 64}
TOKENS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def made(config: Any, *, auto: Any = transformers.AutoModelForCausalLM) -> Model:
    torch.manual_seed(0)
    hf = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Model(hf.requires_grad_(requires_grad=False), None, spec="tiny", folder=Path())


def read(model: Model, *names: str, layer: int = 1) -> list[Tensor]:
    sites = [f"blocks.{layer}.hook_{name}" for name in names]
    found = model.capture(TOKENS, sites)
    return [found[site] for site in sites]


def granite() -> Model:
    return made(
        transformers.GraniteConfig(
            **ROTARY, residual_multiplier=0.22, embedding_multiplier=12.0, logits_scaling=8.0,
            attention_multiplier=0.1,
        )
    )  # fmt: skip


def opt(**fields: Any) -> Model:
    return made(transformers.OPTConfig(**OPT, **{"word_embed_proj_dim": 32, **fields}))


def falcon(**fields: Any) -> Model:
    return made(transformers.FalconConfig(**SHARED, **fields))


ADD_UP: dict[str, tuple[Callable[[], Model], str]] = {
    "granite": (granite, SEQUENTIAL),
    "bloom": (lambda: made(transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4,
                                                    vocab_size=300)), SEQUENTIAL),
    "mpt": (lambda: made(transformers.MptConfig(d_model=32, n_layers=3, n_heads=4, max_seq_len=64,
                                                vocab_size=300)), SEQUENTIAL),
    "opt": (opt, SEQUENTIAL),
    "opt-350m": (lambda: opt(word_embed_proj_dim=16, do_layer_norm_before=False), AFTER),
    "falcon": (falcon, PARALLEL),
    "falcon-sequential": (lambda: falcon(parallel_attn=False, alibi=True), SEQUENTIAL),
    "gpt": (lambda: made(transformers.OpenAIGPTConfig(n_embd=32, n_layer=3, n_head=4,
                                                      n_positions=64, vocab_size=300)), AFTER),
}  # fmt: skip


@pytest.mark.parametrize("name", ADD_UP)
def test_parts_add_up_to_the_models_own_hidden_states(name: str) -> None:
    make, how = ADD_UP[name]
    model = make()
    states = model.hf(TOKENS, output_hidden_states=True).hidden_states
    assert set(model.site_map.readable.sums.values()) == {how}
    pre, attn, mlp, post = read(model, "resid_pre", "attn_out", "mlp_out", "resid_post")
    torch.testing.assert_close(pre, states[1])
    torch.testing.assert_close(post, states[2])
    if how == PARALLEL:
        torch.testing.assert_close(pre + attn + mlp, states[2])
        with pytest.raises(InputError, match="attention and MLP are parallel"):
            model.d_in("blocks.1.hook_resid_mid")
        return
    (mid,) = read(model, "resid_mid")
    if how == SEQUENTIAL:
        torch.testing.assert_close(pre + attn, mid, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mid + mlp, states[2], rtol=1e-4, atol=1e-5)
        return
    block = model.hf.get_submodule(model.site_map._components["blocks"].name)[1]
    norms = [m for m in block.children() if isinstance(m, torch.nn.LayerNorm)]
    torch.testing.assert_close(norms[0](pre + attn), mid, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms[1](mid + mlp), states[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["granite", "bloom", "mpt", "opt", "opt-350m", "falcon"])
def test_edits_of_what_is_added_change_the_stream_by_as_much(name: str) -> None:
    model = ADD_UP[name][0]()
    added = torch.linspace(-1, 1, 32)
    pre, attn, mlp = read(model, "resid_pre", "attn_out", "mlp_out")
    after = "blocks.1.hook_resid_post"
    with model.edit({"blocks.1.hook_mlp_out": lambda x, _: x.clone()}):
        assert torch.allclose(model.logits(TOKENS), model.hf(TOKENS).logits, atol=1e-6)
    with model.edit({"blocks.1.hook_mlp_out": lambda x, _: x + added}):
        found = model.capture(TOKENS, [after])[after]
    if ADD_UP[name][1] != AFTER:
        (post,) = read(model, "resid_post")
        torch.testing.assert_close(found, post + added, rtol=1e-4, atol=1e-5)
    with model.edit({"blocks.1.hook_attn_out": lambda x, _: 0 * x}):
        sites = ["blocks.1.hook_attn_out", after]
        assert (model.capture(TOKENS, sites)[sites[0]] == 0).all()
    if ADD_UP[name][1] == SEQUENTIAL:
        with model.edit({"blocks.1.hook_resid_mid": lambda x, _: pre + attn + added}):
            (mid, post) = read(model, "resid_mid", "resid_post")
        torch.testing.assert_close(mid, pre + attn + added, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(post - mid, mlp)


@pytest.mark.parametrize("name", ["granite", "bloom", "mpt", "opt", "opt-350m", "falcon", "gpt"])
def test_the_stream_leads_to_the_logits_by_the_unembedding(name: str) -> None:
    model = ADD_UP[name][0]()
    w_u, _ = model.unembedding()
    assert w_u.shape == (32, 300)
    (x,) = read(model, "resid_post", layer=2)
    if "ln_final.hook_out" in model.sites():
        x = model.capture(TOKENS, ["ln_final.hook_out"])["ln_final.hook_out"]
    torch.testing.assert_close(x @ w_u, model.hf(TOKENS).logits, rtol=1e-3, atol=1e-4)


def test_an_unembedding_that_is_not_all_is_refused() -> None:
    config = transformers.ModernBertDecoderConfig(
        **SHARED, intermediate_size=48, max_position_embeddings=64, pad_token_id=2
    )
    with pytest.raises(InputError, match="not its final norm and unembedding alone"):
        made(config).unembedding()


def test_embeddings_are_what_the_first_block_reads() -> None:
    for model in (granite(), opt(word_embed_proj_dim=16, do_layer_norm_before=False)):
        found = model.capture(TOKENS, ["hook_embed"])["hook_embed"]
        position = (
            model.capture(TOKENS, ["hook_pos_embed"]) if "hook_pos_embed" in model.sites() else {}
        )
        expected = model.hf(TOKENS, output_hidden_states=True).hidden_states[0]
        torch.testing.assert_close(found + sum(position.values()), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": True},
        {"multi_query": False},
        {"multi_query": True},
    ],
)
def test_falcons_joint_projection(fields: dict[str, Any]) -> None:
    """Against the model's own splitting, of which repeated keys and values are taken once."""
    model = falcon(**fields)
    attention = model.hf.transformer.h[1].self_attention
    joint: list[Tensor] = []
    handle = attention.query_key_value.register_forward_hook(lambda *a: joint.append(a[2]))
    model.hf(TOKENS)
    handle.remove()
    q, k, v = attention._split_heads(joint[0])
    repeated = q.shape[2] // 2 if fields.get("num_kv_heads") else 1
    for name, x in (("q", q), ("k", k[:, :, ::repeated]), ("v", v[:, :, ::repeated])):
        site = f"blocks.1.attn.hook_{name}"
        assert torch.equal(model.capture(TOKENS, [site])[site], x.flatten(2)), name


def test_queries_without_the_gates_beside_them() -> None:
    config = transformers.Qwen3NextConfig(
        **ROTARY, head_dim=8, layer_types=["linear_attention", "full_attention", "full_attention"],
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    )  # fmt: skip
    model = made(config)
    attention = model.hf.model.layers[1].self_attn
    normed: list[Tensor] = []
    handle = attention.q_norm.register_forward_pre_hook(lambda _, args: normed.append(args[0]))
    model.hf(TOKENS)
    handle.remove()
    site = "blocks.1.attn.hook_q"
    assert torch.equal(model.capture(TOKENS, [site])[site], normed[0].flatten(2))


def test_a_model_without_a_cache_or_a_limit() -> None:
    model = made(transformers.MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=300))
    assert model.n_ctx is None
    assert model.capture(TOKENS, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"].ndim == 3
    prompt = TOKENS[0].tolist()
    found = model.generate_ids(prompt, max_new_tokens=4, stop_at_eos=False)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert found == model.hf.generate(TOKENS[:1], **settings)[0].tolist()
    seen: list[Tensor] = []
    with model.edit({"blocks.1.hook_resid_post": lambda x, at: seen.append(at)}):
        model.hf.generate(TOKENS[:1], **settings)
    assert torch.cat(seen).tolist() == list(range(len(prompt) + 3))


def test_the_longest_text() -> None:
    sizes: dict[str, Any] = {**SHARED, "num_hidden_layers": 1}
    roberta = transformers.RobertaModel(
        transformers.RobertaConfig(**sizes, max_position_embeddings=34, pad_token_id=1)
    )
    assert longest_text(roberta) == 32
    roberta(torch.full((1, 32), 5))
    bert = transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=34))
    assert longest_text(bert) == 34
    assert opt().n_ctx == 64
    opt().logits(torch.full((1, 64), 5))


def test_a_model_without_a_tokenizer_reads_token_ids(tmp_path: Path) -> None:
    """Of GPT-2's kind transformers makes an empty one, of Llama's none at all."""
    for config in (
        transformers.LlamaConfig(**ROTARY, eos_token_id=1, bos_token_id=0),
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, eos_token_id=1),
    ):
        folder = tmp_path / config.model_type
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        model = load_model(str(folder), dtype="float32")
        assert model.tokenizer is None
        assert 1 in model.special_token_ids
        assert model.generate_ids([5, 6], max_new_tokens=2, stop_at_eos=False)[:2] == [5, 6]
        for ask in (lambda m=model: m.tokenize("text"), lambda m=model: m.generate("text")):
            with pytest.raises(InputError, match="has no tokenizer"):
                ask()
        ids, text = model.codec.spell(np.array([5, 6, 1]))
        assert (ids.tolist(), text) == ([5, 6], "<5><6>")
        with pytest.raises(InputError, match=r"no token of this model.*given: 300"):
            model.codec.spell(np.array([300]))


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1800)
def test_every_causal_architecture() -> None:
    rows = sweep(causal())
    assert {row.name: row.problems for row in rows if row.problems} == {}
    assert sum(not row.refused for row in rows) >= 80
