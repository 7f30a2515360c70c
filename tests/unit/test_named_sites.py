"""Every short name against a plain transformers model: hooks on its own modules, by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from activations import Model, load_model
from tests.tiny import ARCHITECTURES, N_LAYERS, make_tiny_model

Split = Callable[[Tensor], Tensor]
Place = tuple[str, str] | tuple[str, str, Split]


def third(number: int) -> Split:
    """GPT-2 keeps query, key and value one after another."""
    return lambda x: x[..., 32 * number : 32 * (number + 1)]


def of_each_head(number: int) -> Split:
    """GPT-NeoX keeps query, key and value of a head together."""
    return lambda x: x.unflatten(-1, (4, 3, 8))[..., number, :].flatten(-2)


LAYER = {"llama": "model.layers.1", "gemma2": "model.layers.1", "gpt2": "transformer.h.1",
         "gpt_neox": "gpt_neox.layers.1"}  # fmt: skip
IN_LLAMA: dict[str, Place] = {
    "resid_pre": ("", "input"),
    "resid_post": ("", "output"),
    "ln1": (".input_layernorm", "output"),
    "q": (".self_attn.q_proj", "output"),
    "k": (".self_attn.k_proj", "output"),
    "v": (".self_attn.v_proj", "output"),
    "z": (".self_attn.o_proj", "input"),
    "mlp_in": (".mlp.gate_proj", "input"),
    "mlp_pre": (".mlp.gate_proj", "output"),
    "mlp_post": (".mlp.down_proj", "input"),
}
PLACES: dict[str, dict[str, Place]] = {
    "llama": {
        **IN_LLAMA,
        "attn_out": (".self_attn.o_proj", "output"),
        "resid_mid": (".post_attention_layernorm", "input"),
        "ln2": (".post_attention_layernorm", "output"),
        "mlp_out": (".mlp.down_proj", "output"),
    },
    "gemma2": {
        **IN_LLAMA,
        "attn_out": (".post_attention_layernorm", "output"),
        "resid_mid": (".pre_feedforward_layernorm", "input"),
        "ln2": (".pre_feedforward_layernorm", "output"),
        "mlp_out": (".post_feedforward_layernorm", "output"),
    },
    "gpt2": {
        "resid_pre": (".ln_1", "input"),
        "resid_mid": (".ln_2", "input"),
        "resid_post": ("", "output"),
        "ln1": (".ln_1", "output"),
        "ln2": (".ln_2", "output"),
        **{name: (".attn.c_attn", "output", third(n)) for n, name in enumerate("qkv")},
        "z": (".attn.c_proj", "input"),
        "attn_out": (".attn.c_proj", "output"),
        "mlp_in": (".mlp.c_fc", "input"),
        "mlp_pre": (".mlp.c_fc", "output"),
        "mlp_post": (".mlp.c_proj", "input"),
        "mlp_out": (".mlp.c_proj", "output"),
    },
    "gpt_neox": {
        "resid_pre": (".input_layernorm", "input"),
        "resid_post": ("", "output"),
        "ln1": (".input_layernorm", "output"),
        "ln2": (".post_attention_layernorm", "output"),
        **{
            name: (".attention.query_key_value", "output", of_each_head(n))
            for n, name in enumerate("qkv")
        },
        "z": (".attention.dense", "input"),
        "attn_out": (".attention.dense", "output"),
        "mlp_in": (".mlp.dense_h_to_4h", "input"),
        "mlp_pre": (".mlp.dense_h_to_4h", "output"),
        "mlp_post": (".mlp.dense_4h_to_h", "input"),
        "mlp_out": (".mlp.dense_4h_to_h", "output"),
    },
}
OUTSIDE = {
    "llama": {"embed": "model.embed_tokens", "ln_final": "model.norm"},
    "gemma2": {"embed": "model.embed_tokens", "ln_final": "model.norm"},
    "gpt2": {"embed": "transformer.wte", "pos_embed": "transformer.wpe",
             "ln_final": "transformer.ln_f"},
    "gpt_neox": {"embed": "gpt_neox.embed_in", "ln_final": "gpt_neox.final_layer_norm"},
}  # fmt: skip


def seen_by_hand(model: Model, tokens: Tensor, places: dict[str, Place]) -> dict[str, Tensor]:
    """What plain hooks on the Hugging Face modules see in a whole forward pass."""
    found: dict[str, Tensor] = {}
    handles = []

    def note(name: str, value: Tensor | tuple[Tensor, ...], split: Split) -> None:
        found[name] = split(value if isinstance(value, Tensor) else value[0]).detach().clone()

    for name, (path, side, *splits) in places.items():
        split = splits[0] if splits else lambda x: x
        module = model.hf.get_submodule(path)
        if side == "output":
            handles.append(
                module.register_forward_hook(lambda _m, _a, out, n=name, s=split: note(n, out, s))
            )
        else:
            handles.append(
                module.register_forward_pre_hook(lambda _m, args, n=name, s=split: note(n, args, s))
            )
    model.hf(tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
    return load_model(str(folder), dtype="float32")


def test_each_name_is_what_a_plain_hook_sees(architecture: str, model: Model) -> None:
    tokens = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    layer = LAYER[architecture]
    places: dict[str, Place] = {}
    for name, place in PLACES[architecture].items():
        whole = layer + place[0]
        places[f"{name}:1"] = (whole, place[1], place[2]) if len(place) == 3 else (whole, place[1])
    places |= {name: (path, "output") for name, path in OUTSIDE[architecture].items()}
    expected = seen_by_hand(model, tokens, places)
    full = {name: model.resolve(name)[0] for name in places}
    captured = model.capture(tokens, list(full.values()))
    for name, site in full.items():
        wanted = expected[name].expand(2, -1, -1)  # GPT-2 embeds positions once for all sequences
        assert torch.equal(captured[site], wanted), name
    in_blocks = {name.removesuffix(":1") for name in places}
    left_out = {"pos_embed"} if architecture != "gpt2" else set()
    left_out |= {"resid_mid"} if architecture == "gpt_neox" else set()
    assert in_blocks | left_out == {
        *("resid_pre", "resid_mid", "resid_post", "ln1", "ln2", "q", "k", "v", "z", "attn_out"),
        *("mlp_in", "mlp_pre", "mlp_post", "mlp_out", "embed", "pos_embed", "ln_final"),
    }


def test_patterns_take_any_number_of_layers(model: Model) -> None:
    everywhere = [f"blocks.{n}.hook_resid_post" for n in range(N_LAYERS)]
    assert model.resolve("resid_post:*") == everywhere
    assert model.resolve(["resid_post:1-2", "resid_post:*", "embed"]) == [
        *everywhere[1:], everywhere[0], "hook_embed",
    ]  # fmt: skip
    assert model.sites("ln1:*") == [f"blocks.{n}.ln1.hook_out" for n in range(N_LAYERS)]
    assert model.resolve("ln_final") == ["ln_final.hook_out"]
    module = model.resolve("blocks.1.hook_resid_post")
    assert module == ["blocks.1.hook_resid_post"]


def test_modules_by_pattern(architecture: str, model: Model) -> None:
    layers = LAYER[architecture].removesuffix(".1")
    found = model.resolve(f"module:{layers}.*:output")
    assert found == [f"module:{layers}.{n}:output" for n in range(N_LAYERS)]
    tokens = torch.arange(5, 15)[None]
    sites = [*found, "blocks.1.hook_resid_post", f"module:{layers}.1:update"]
    seen = model.capture(tokens, [*sites, "blocks.1.hook_resid_pre"])
    assert torch.equal(seen[found[1]], seen["blocks.1.hook_resid_post"])
    update = seen["blocks.1.hook_resid_post"] - seen["blocks.1.hook_resid_pre"]
    assert torch.equal(seen[f"module:{layers}.1:update"], update)
    assert model.d_in(found[0]) == 32
