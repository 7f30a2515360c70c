"""Models: the right tensors at every site, splicing, text and generation."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from activations import Model, load_model
from saescope.errors import InputError
from tests.tiny import ARCHITECTURES, D_MODEL, N_CTX, N_LAYERS, make_tiny_model

TEXT = "The river rose in the night and the bridge at the mill was closed."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    return {name: load_model(str(path), dtype="float32") for name, path in folders.items()}


@pytest.fixture(scope="module")
def llama(models: dict[str, Model]) -> Model:
    return models["llama"]


def random_tokens(model: Model, batch: int = 2, length: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, model.d_vocab, (batch, length), generator=generator)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


def count_hooks(model: Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_facts_of_a_model(models: dict[str, Model], architecture: str) -> None:
    model = models[architecture]
    assert (model.n_layers, model.d_model, model.n_ctx) == (N_LAYERS, D_MODEL, N_CTX)
    assert model.d_vocab == len(model.tokenizer)
    assert (model.bos_token_id is not None) == (architecture in ("llama", "gemma2"))
    assert model.eos_token_id in model.special_token_ids
    assert len(model.weights_hash) == len(model.tokenizer_hash) == 64
    assert not model.hf.training
    assert model.hf.config._attn_implementation != "eager" or architecture == "gemma2"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_residual_sites_equal_hugging_faces_own_hidden_states(
    models: dict[str, Model], architecture: str
) -> None:
    model, tokens = models[architecture], random_tokens(models[architecture])
    states = model.hf(tokens, output_hidden_states=True).hidden_states
    pre = [f"blocks.{n}.hook_resid_pre" for n in range(N_LAYERS)]
    post = [f"blocks.{n}.hook_resid_post" for n in range(N_LAYERS - 1)]
    found = model.capture(tokens, pre + post)
    for n in range(N_LAYERS):
        assert_near(found[pre[n]], states[n], 1e-6)
    for n in range(N_LAYERS - 1):  # the last hidden state of HF is after the final norm
        assert_near(found[post[n]], states[n + 1], 1e-6)
    if architecture != "gpt2":  # GPT-2 adds position embeddings
        assert_near(model.capture(tokens, ["hook_embed"])["hook_embed"], states[0], 1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_site_equals_the_bridges(models: dict[str, Model], architecture: str) -> None:
    model, tokens = models[architecture], random_tokens(models[architecture])
    sites = model.sites()
    assert len(sites) > 8 * N_LAYERS
    ours = model.capture(tokens, sites)
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(tokens)
    compared = 0
    for site in sites:
        if site not in cache:
            continue
        theirs = cache[site]
        assert_near(ours[site], theirs.reshape(ours[site].shape))
        compared += 1
    named = ("hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "attn.hook_k")
    assert all(f"blocks.1.{name}" in cache and f"blocks.1.{name}" in ours for name in named)
    assert compared >= 8 * N_LAYERS


def test_bridge_shares_the_weights_and_leaves_the_model_alone(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["llama"]), dtype="float32")
    tokens = random_tokens(model)
    before, kinds = model.logits(tokens), [type(module) for module in model.hf.modules()]
    assert_near(model.bridge(tokens), before)
    assert [type(module) for module in model.hf.modules()] == kinds
    assert model.hf.config._attn_implementation == "sdpa"
    assert torch.equal(model.logits(tokens), before)
    pointers = {p.data_ptr() for p in model.hf.parameters()}
    assert {p.data_ptr() for p in model.bridge.original_model.parameters()} <= pointers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_add_up_to_the_residual_stream(models: dict[str, Model], architecture: str) -> None:
    model, tokens = models[architecture], random_tokens(models[architecture])
    names = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    found = model.capture(tokens, [f"blocks.1.{name}" for name in names])
    pre, attention, mlp, post = (found[f"blocks.1.{name}"] for name in names)
    assert_near(pre + attention + mlp, post, 1e-5)
    if architecture == "gpt_neox":  # parallel: there is nothing between attention and MLP
        assert model.sites("blocks.*.hook_resid_mid") == []
    else:
        mid = model.capture(tokens, ["blocks.1.hook_resid_mid"])["blocks.1.hook_resid_mid"]
        assert_near(pre + attention, mid, 1e-5)


@pytest.mark.parametrize(("architecture", "output"), [("llama", "o_proj"), ("gpt2", "c_proj")])
def test_hook_z_is_the_input_of_the_output_projection(
    models: dict[str, Model], architecture: str, output: str
) -> None:
    model, tokens = models[architecture], random_tokens(models[architecture])
    sites = ["blocks.2.attn.hook_z", "blocks.2.hook_attn_out"]
    z, out = (model.capture(tokens, sites)[site] for site in sites)
    attention = dict(model.hf.named_modules())
    projection = next(m for n, m in attention.items() if "2" in n and n.endswith(f"attn.{output}"))
    assert z.shape[-1] == 32
    assert_near(projection(z), out, 1e-6)


def test_query_key_value_widths_follow_the_heads(models: dict[str, Model]) -> None:
    widths = {a: [models[a].d_in(f"blocks.0.attn.hook_{x}") for x in "qkv"] for a in ARCHITECTURES}
    assert widths["llama"] == widths["gemma2"] == [32, 16, 16]
    assert widths["gpt2"] == widths["gpt_neox"] == [32, 32, 32]
    assert models["llama"].d_in("blocks.0.mlp.hook_post") == 48


def test_capture_stops_after_the_deepest_site(llama: Model) -> None:
    ran = []
    layers = llama.hf.model.layers
    hooks_before = count_hooks(llama)
    handles = [
        layer.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(layers)
    ]
    llama.capture(random_tokens(llama), ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"])
    for handle in handles:
        handle.remove()
    assert ran == [0]
    assert count_hooks(llama) == hooks_before


def test_a_module_site_by_its_own_path(llama: Model) -> None:
    tokens = random_tokens(llama)
    names = ["module:model.layers.1:output", "blocks.1.hook_resid_post", "blocks.1.hook_out"]
    found = llama.capture(tokens, names)
    assert all(torch.equal(found[name], found[names[0]]) for name in names)


def test_unknown_sites_name_the_nearest(models: dict[str, Model]) -> None:
    llama = models["llama"]
    with pytest.raises(InputError, match=r"blocks\.1\.hook_resid_post"):
        llama.resolve("blocks.1.hook_resid_pots")
    with pytest.raises(InputError, match="last layer is 2"):
        llama.resolve("blocks.9.hook_resid_post")
    with pytest.raises(InputError, match="no such site"):
        models["gpt_neox"].resolve("blocks.1.hook_resid_mid")
    with pytest.raises(InputError, match="no site of this model matches"):
        llama.resolve("blocks.*.hook_nothing")
    with pytest.raises(InputError, match="no such site"):
        llama.resolve("module:model.layers.7:output")


def test_resolve_expands_patterns_once_and_in_order(llama: Model) -> None:
    expected = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"]
    assert llama.resolve(["blocks.0-1.hook_mlp_out", "blocks.*.hook_mlp_out"]) == expected


EDIT_SITES = [
    "hook_embed",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_resid_mid",
    "blocks.1.hook_resid_post",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_mlp_out",
    "blocks.1.attn.hook_z",
    "blocks.1.attn.hook_k",
    "blocks.1.mlp.hook_post",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", EDIT_SITES)
def test_edits_none_is_bit_exact_and_a_change_changes(
    models: dict[str, Model], architecture: str, site: str
) -> None:
    model, tokens = models[architecture], random_tokens(models[architecture])
    if site not in model.sites():
        assert (architecture, site) == ("gpt_neox", "blocks.1.hook_resid_mid")
        return
    before = model.logits(tokens)
    with model.edit({site: lambda x, position: None}):
        assert torch.equal(model.logits(tokens), before)
    with model.edit({site: lambda x, position: x.clone()}):
        assert torch.equal(model.logits(tokens), before)
    # not a constant shift, which layer norm (and, of keys, softmax) would undo
    with model.edit({site: lambda x, position: 1.5 * x + torch.linspace(-1, 1, x.shape[-1])}):
        seen = model.capture(tokens, [site])[site]
        changed = model.logits(tokens)
    plain = model.capture(tokens, [site])[site]
    assert_near(seen, 1.5 * plain + torch.linspace(-1, 1, plain.shape[-1]), 1e-6)
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(model.logits(tokens), before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_an_edit_at_resid_mid_reaches_the_residual_stream(
    models: dict[str, Model], architecture: str
) -> None:
    model, tokens = models[architecture], random_tokens(models[architecture])
    sites = ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    replacement = torch.randn(2, 20, D_MODEL, generator=torch.Generator().manual_seed(3))
    with model.edit({"blocks.1.hook_resid_mid": lambda x, position: replacement}):
        mlp, post = (model.capture(tokens, sites)[site] for site in sites)
    assert_near(post, replacement + mlp, 1e-5)


def test_gradients_flow_through_an_edit(llama: Model) -> None:
    tokens = random_tokens(llama)
    direction = torch.zeros(D_MODEL, requires_grad=True)
    edits = {
        "blocks.0.hook_resid_post": lambda x, position: x + direction,
        "blocks.1.hook_resid_mid": lambda x, position: x * x.sigmoid(),
    }
    with llama.edit(edits):
        llama.hf(tokens).logits[0, -1, 7].backward()
    assert direction.grad is not None
    assert direction.grad.abs().sum() > 0


def test_an_edit_of_another_shape_is_refused(llama: Model) -> None:
    with (
        llama.edit({"blocks.0.hook_resid_post": lambda x, position: x[:, :1]}),
        pytest.raises(InputError, match="the shape it was given"),
    ):
        llama.logits(random_tokens(llama))
    with pytest.raises(InputError, match="no such site"), llama.edit({"nowhere": lambda x, p: x}):
        pass


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_positions_are_absolute_with_and_without_a_cache(
    models: dict[str, Model], architecture: str
) -> None:
    model = models[architecture]
    site, seen = "blocks.1.hook_resid_post", []

    def note(x: Tensor, position: Tensor) -> Tensor:
        assert x.shape[1] == len(position)
        seen.append(position.tolist())
        return x + torch.where(position[:, None] == 9, 3.0, 0.0)

    prompt = model.tokenize("The river rose")[:6]
    with model.edit({site: note}):
        cached = model.generate_ids(prompt, max_new_tokens=8, stop_at_eos=False)
        assert seen == [list(range(len(prompt))), *([n] for n in range(len(prompt), 13))]
        seen.clear()
        whole = model.generate_ids(prompt, max_new_tokens=8, stop_at_eos=False, use_cache=False)
        assert seen[-1] == list(range(13))
        seen.clear()
        theirs = model.hf.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            pad_token_id=model.eos_token_id,
        )[0].tolist()  # fmt: skip
        assert [p for positions in seen for p in positions] == list(range(13))
    assert cached == whole == theirs


def test_generation(llama: Model) -> None:
    text = llama.generate("The river", max_new_tokens=5, stop_at_eos=False)
    assert isinstance(text, str)
    assert text.startswith("The river")
    draws = [llama.generate("The river", temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(InputError, match="longer than the model's context"):
        llama.generate("The river", max_new_tokens=N_CTX)
    with pytest.raises(InputError, match="temperature"):
        llama.generate("The river", temperature=-1.0)
    with pytest.raises(InputError, match="no tokens"):
        llama.generate([])


def test_generation_stops_at_eos(llama: Model) -> None:
    bias = torch.zeros(D_MODEL)
    head = llama.hf.get_output_embeddings().weight
    bias += 1e3 * head[llama.eos_token_id] - 1e3 * head.mean(0)
    with llama.edit({"blocks.2.hook_resid_post": lambda x, position: 0 * x + bias}):
        assert llama.generate("The river", max_new_tokens=5) == "The river"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_strings_join_to_the_text(models: dict[str, Model], architecture: str) -> None:
    model = models[architecture]
    for text in (TEXT, " leading space", "水 and 火: naïve café, 🙂 done", ""):
        ids = model.tokenize(text)
        first = 0 if model.bos_token_id is None else 1
        pieces = model.token_strings(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces[first:]) == text
    split = model.token_strings(model.tokenizer("🙂x", add_special_tokens=False).input_ids)
    assert split[-2:] == ["🙂", "x"]
    assert set(split[:-2]) == {""}


def test_token_strings_never_lose_an_unfinished_character(llama: Model) -> None:
    ids = llama.tokenizer("🙂", add_special_tokens=False).input_ids
    assert "\ufffd" in llama.token_strings(ids[:-1])[-1]
    assert llama.token_strings([*ids[:1], *llama.tokenizer("ab").input_ids[1:]])[1][0] == "\ufffd"


def test_vocabulary_has_every_token(llama: Model) -> None:
    texts = llama.vocabulary()
    assert len(texts) == llama.d_vocab
    ids = llama.tokenize("The river")[1:]
    assert [texts[i] for i in ids] == llama.token_strings(ids)
    assert texts[0] == "<bos>"
    parts = llama.tokenizer("🙂", add_special_tokens=False).input_ids
    assert b"".join(bytes(texts[i]) for i in parts) == "🙂".encode()  # type: ignore[arg-type]
    codec = llama._text
    assert codec.vocabulary(llama.d_vocab + 1)[-1] == f"<unused {llama.d_vocab}>"


def test_keep_mask_drops_the_first_position_and_special_tokens(llama: Model) -> None:
    bos, eos = llama.bos_token_id, llama.eos_token_id
    tokens = torch.tensor([[bos, 9, eos, 10], [11, 12, bos, 13]])
    assert llama.keep_mask(tokens).tolist() == [
        [False, True, False, True],
        [False, True, False, True],
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unembedding_gives_the_logits(models: dict[str, Model], architecture: str) -> None:
    model, tokens = models[architecture], random_tokens(models[architecture])
    w_u, weight = model.unembedding()
    assert w_u.shape == (D_MODEL, model.d_vocab)
    assert weight is not None
    last = model.capture(tokens, ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    normed = model.capture(tokens, ["ln_final.hook_out"])["ln_final.hook_out"]
    if architecture in ("llama", "gemma2"):  # RMS norms have no bias
        expected = last / last.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt() * weight
        assert_near(normed, expected, 1e-4)
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    logits = normed @ w_u
    assert_near(torch.tanh(logits / cap) * cap if cap else logits, model.logits(tokens), 1e-5)


def test_too_many_positions_are_refused(llama: Model) -> None:
    tokens = random_tokens(llama, length=N_CTX + 1)
    for run in (llama.logits, lambda t: llama.capture(t, ["hook_embed"])):
        with pytest.raises(InputError, match="more positions than the model has"):
            run(tokens)
    with pytest.raises(InputError, match="tokens must be"):
        llama.logits(tokens[0])
