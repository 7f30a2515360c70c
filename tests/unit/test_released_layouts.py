"""One folder in the exact layout of each family's releases, under innocent and misleading parents.

Features and reconstructions are computed here from the family's own formula;
docs/reference/formats.md lists where each layout is from.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae.core.base import SparseAutoencoder, kind_of
from sae.formats.load import load
from saescope.errors import ArtefactError, InputError

D_IN, D_SAE, D_OUT, K = 6, 16, 6, 3
PARENTS = ("", "transcoder_comparison", "my-research", "layer_3_ablation", "embedding", "clt-mlp")


def rows() -> Tensor:
    return 2 * torch.randn(40, D_IN, generator=torch.Generator().manual_seed(9))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(*, skip: bool = False) -> dict[str, Tensor]:
    found = {
        "W_enc": draw(D_IN, D_SAE, seed=1),
        "W_dec": draw(D_SAE, D_OUT, seed=2),
        "b_enc": draw(D_SAE, seed=3),
        "b_dec": draw(D_OUT, seed=4),
        "threshold": draw(D_SAE, seed=5).abs() + 0.1,
    }
    return found | ({"affine_skip_connection": draw(D_IN, D_OUT, seed=6)} if skip else {})


def jumprelu(t: dict[str, Tensor], x: Tensor) -> Tensor:
    pre = x @ t["W_enc"] + t["b_enc"]
    return torch.where(pre > t["threshold"], pre, 0.0)


def top(pre: Tensor, k: int = K) -> Tensor:
    best = pre.relu().topk(k)
    return torch.zeros_like(pre).scatter_(1, best.indices, best.values)


def save_npz(folder: Path, tensors: dict[str, Tensor]) -> None:
    arrays: dict[str, Any] = {n: v.numpy() for n, v in tensors.items()}
    np.savez(folder / "params.npz", **arrays)


def check(sae: SparseAutoencoder, features: Tensor, x_hat: Tensor, x: Tensor | None = None) -> None:
    x = rows() if x is None else x
    assert features.any()
    torch.testing.assert_close(sae.encode(x), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x).x_hat, x_hat, rtol=1e-5, atol=2e-5)


# ---- Gemma Scope 1: names alone -------------------------------------------------------------

FIRST = [
    (
        "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82",
        "blocks.12.hook_resid_post",
        None,
        "google/gemma-2-2b",
    ),
    (
        "gemma-scope-9b-it-res/layer_31/width_131k/average_l0_76",
        "blocks.31.hook_resid_post",
        None,
        "google/gemma-2-9b-it",
    ),
    (
        "gemma-scope-2b-pt-mlp/layer_0/width_65k/average_l0_44",
        "blocks.0.hook_mlp_out",
        None,
        "google/gemma-2-2b",
    ),
    (
        "gemma-scope-27b-pt-att/layer_7/width_1m/average_l0_9",
        "blocks.7.attn.hook_z",
        None,
        "google/gemma-2-27b",
    ),
    (
        "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_54",
        "blocks.3.ln2.hook_normalized",
        "blocks.3.hook_mlp_out",
        "google/gemma-2-2b",
    ),
]


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize(("name", "site", "target", "model"), FIRST)
def test_gemma_scope_1(
    parent: str, name: str, site: str, target: str | None, model: str, tmp_path: Path
) -> None:
    folder = tmp_path / parent / name
    folder.mkdir(parents=True)
    t = parts()
    save_npz(folder, t)
    sae = load(folder)
    assert sae.metadata.get("site") == site
    assert sae.metadata.get("target_site") == target
    assert sae.metadata["model"] == model
    assert sae.metadata["claimed"] == {"l0": float(name.rpartition("_")[2])}
    assert kind_of(sae.config) == ("jumprelu" if target is None else "transcoder")
    features = jumprelu(t, rows())
    check(sae, features, features @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("parent", PARENTS)
def test_gemma_scope_1_embedding(parent: str, tmp_path: Path) -> None:
    folder = tmp_path / parent / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    folder.mkdir(parents=True)
    t = parts()
    save_npz(folder, {f"w_{n[2:]}" if n[:2] == "W_" else n: v for n, v in t.items()})
    sae = load(folder)
    assert sae.metadata["site"] == "hook_embed"
    features = jumprelu(t, rows())
    x_hat = (features @ t["W_dec"] + t["b_dec"]) * D_IN**0.5
    check(sae, features, x_hat, rows() * D_IN**0.5)


@pytest.mark.parametrize(
    "name",
    [
        "layer_12/width_16k/average_l0_82",
        "gemma-scope-2b-pt-res-copy/layer_12/average_l0_82",
        "gemma-scope-2b-pt-res/layer_12",
        "embedding",
        "transcoders/layer_3",
    ],
)
def test_a_name_that_is_not_a_releases_tells_nothing(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    t = parts()
    save_npz(folder, t)
    sae = load(folder)
    assert kind_of(sae.config) == "jumprelu"
    assert "site" not in sae.metadata
    features = jumprelu(t, rows())
    check(sae, features, features @ t["W_dec"] + t["b_dec"])
    # the user says what nothing else does
    named = load(folder, site="ln2:3", target_site="mlp_out:3")
    assert named.transcodes
    assert named.metadata["site"] == "blocks.3.ln2.hook_out"
    assert named.metadata["target_site"] == "blocks.3.hook_mlp_out"
    check(named, features, features @ t["W_dec"] + t["b_dec"])


def test_the_hubs_cache_names_the_repository(tmp_path: Path) -> None:
    name = "models--google--gemma-scope-2b-pt-mlp/snapshots/0a1b2c/layer_4/width_16k/average_l0_5"
    folder = tmp_path / "transcoder" / name
    folder.mkdir(parents=True)
    save_npz(folder, parts())
    assert load(folder).metadata["site"] == "blocks.4.hook_mlp_out"


# ---- Gemma Scope 2: config.json -------------------------------------------------------------

LAYER = "model.layers.7"
SECOND = [
    (
        "resid_post_all/layer_7_width_16k_l0_small",
        "sae",
        "output",
        None,
        "blocks.7.hook_resid_post",
        None,
    ),
    (
        "attn_out_all/layer_7_width_16k_l0_small",
        "sae",
        "self_attn.o_proj.input",
        None,
        "blocks.7.attn.hook_z",
        None,
    ),
    (
        "mlp_out/layer_7_width_65k_l0_big",
        "sae",
        "post_feedforward_layernorm.output",
        None,
        "blocks.7.hook_mlp_out",
        None,
    ),
    (
        "transcoder_all/layer_7_width_16k_l0_big",
        "transcoder",
        "pre_feedforward_layernorm.output",
        "post_feedforward_layernorm.output",
        "blocks.7.ln2.hook_out",
        "blocks.7.hook_mlp_out",
    ),
    (
        "transcoder/layer_7_width_262k_l0_medium_affine",
        "transcoder",
        "pre_feedforward_layernorm.output",
        "post_feedforward_layernorm.output",
        "blocks.7.ln2.hook_out",
        "blocks.7.hook_mlp_out",
    ),
]


def second(folder: Path, config: dict[str, Any] | None, *, skip: bool = False) -> dict[str, Tensor]:
    folder.mkdir(parents=True)
    t = parts(skip=skip)
    lower = {f"w_{n[2:]}" if n[:2] == "W_" else n: v for n, v in t.items()}
    save_file(lower, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return t


@pytest.mark.parametrize("parent", ["gemma-scope-2-1b-pt", "transcoder_gemma-scope-2b-pt-mlp"])
@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(("name", "kind", "read", "written", "site", "target"), SECOND)
def test_gemma_scope_2(
    parent: str,
    has_config: bool,
    name: str,
    kind: str,
    read: str,
    written: str | None,
    site: str,
    target: str | None,
    tmp_path: Path,
) -> None:
    """With config.json its own words count, under any name; without, the release's name does."""
    if not has_config and not parent.startswith("gemma-scope-2-"):
        pytest.skip("nothing says what it is")
    affine = name.endswith("affine")
    config = {
        "hf_hook_point_in": f"{LAYER}.{read}",
        "hf_hook_point_out": f"{LAYER}.{written or read}",
        "width": D_SAE,
        "model_name": "gemma-v3-1b-pt",
        "architecture": "jump_relu",
        "l0": 20,
        "affine_connection": affine,
        "type": kind,
    }
    t = second(tmp_path / parent / name, config if has_config else None, skip=affine)
    sae = load(tmp_path / parent / name)
    assert sae.metadata.get("site") == site
    assert sae.metadata.get("target_site") == target
    assert sae.metadata["model"] == "google/gemma-3-1b-pt"
    kinds = {None: "jumprelu", True: "skip_transcoder", False: "transcoder"}
    assert kind_of(sae.config) == kinds[affine if target else None]
    features = jumprelu(t, rows())
    more = rows() @ t["affine_skip_connection"] if affine else 0
    check(sae, features, features @ t["W_dec"] + t["b_dec"] + more)


def test_gemma_scope_2_says_what_it_is_and_not_its_folder(tmp_path: Path) -> None:
    """The kind in config.json wins over names, and its hook points where it names no kind."""
    point = f"{LAYER}.output"
    config = {"hf_hook_point_in": point, "hf_hook_point_out": point, "architecture": "jump_relu"}
    name = "gemma-scope-2-1b-pt/transcoder/layer_3_width_16k_l0_small"
    second(tmp_path / "a" / name, {**config, "type": "sae"})
    assert not load(tmp_path / "a" / name).transcodes
    second(tmp_path / "b" / name, config)
    sae = load(tmp_path / "b" / name)
    assert not sae.transcodes
    assert sae.metadata["site"] == "blocks.7.hook_resid_post"
    other = {**config, "hf_hook_point_out": "model.layers.9.mlp.up_proj.input"}
    second(tmp_path / "c" / name, other)
    assert load(tmp_path / "c" / name).metadata["target_site"] == (
        "module:model.layers.9.mlp.up_proj:input"
    )


@pytest.mark.parametrize(
    ("config", "skip", "message"),
    [
        ({"type": "crosscoder"}, False, "a kind of dictionary that saescope does not read"),
        ({"type": "clt"}, False, "given: 'clt'; allowed: sae, transcoder"),
        ({"type": "sae"}, True, "its tensors are a transcoder's"),
        ({"affine_connection": True}, False, "differ in whether there is an affine connection"),
        ({"hf_hook_point_in": 7}, False, "hf_hook_point_in is not a text"),
        ({"hf_hook_point_in": "../x y"}, False, "not a point of a model"),
        ({"l0": "many"}, False, "l0 is not a number"),
        ({"l0": float("inf")}, False, "no number of JSON"),
    ],
)
def test_gemma_scope_2_contradictions(
    config: dict[str, Any], skip: bool, message: str, tmp_path: Path
) -> None:
    second(tmp_path / "sae", {"architecture": "jump_relu", **config}, skip=skip)
    with pytest.raises((ArtefactError, InputError), match=message):
        load(tmp_path / "sae")


# ---- SAELens, by version --------------------------------------------------------------------


class Saved(NamedTuple):
    """A version's spelling of an SAE."""

    config: dict[str, Any]
    tensors: Callable[[], dict[str, Tensor]]
    features: Callable[[dict[str, Tensor], Tensor], Tensor]
    divides_decoder: bool = False


def plain(*names: str, **more: Tensor) -> Callable[[], dict[str, Tensor]]:
    t = parts()
    return lambda: {**{n: t[n] for n in ("W_enc", "W_dec", "b_dec", *names)}, **more}


def centred(t: dict[str, Tensor], x: Tensor) -> Tensor:
    return (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]


def above(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(pre > threshold, pre, 0.0)


def gated(t: dict[str, Tensor], x: Tensor) -> Tensor:
    pre = (x - t["b_dec"]) @ t["W_enc"]
    return (pre + t["b_gate"] > 0) * torch.relu(pre * t["r_mag"].exp() + t["b_mag"])


def norms(t: dict[str, Tensor]) -> Tensor:
    return t["W_dec"].norm(dim=1)


BATCHTOPK = plain("b_enc", topk_threshold=torch.tensor(1.5, dtype=torch.double))
SAELENS = {
    "1, a whole run": Saved(
        {"hook_point": "h", "activation_fn_str": "relu", "normalize_activations": False},
        plain("b_enc"),
        lambda t, x: centred(t, x).relu(),
    ),
    "3, topk": Saved(
        {
            "sae_lens_version": "3.18.2",
            "architecture": "standard",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": K},
        },
        plain("b_enc"),
        lambda t, x: top(centred(t, x)),
    ),
    "3.5, no b_dec": Saved(
        {"sae_lens_version": "3.5.0", "apply_b_dec_to_input": False},
        plain("b_enc"),
        lambda t, x: (x @ t["W_enc"] + t["b_enc"]).relu(),
    ),
    "5, jumprelu": Saved(
        {"sae_lens_version": "5.3.1", "architecture": "jumprelu"},
        plain("b_enc", "threshold"),
        lambda t, x: above(centred(t, x), t["threshold"]),
    ),
    "5, gated": Saved(
        {"sae_lens_version": "5.3.1", "architecture": "gated"},
        plain(b_gate=draw(D_SAE, seed=6), b_mag=draw(D_SAE, seed=7), r_mag=draw(D_SAE, seed=8)),
        gated,
    ),
    "6.0 rc": Saved(
        {"architecture": "standard", "metadata": {"sae_lens_version": "6.0.0-rc.2"}},
        plain("b_enc"),
        lambda t, x: centred(t, x).relu(),
    ),
    "6.12 topk": Saved(
        {"architecture": "topk", "k": K, "metadata": {"sae_lens_version": "6.12.0"}},
        plain("b_enc"),
        lambda t, x: top(centred(t, x)),
    ),
    "6.47 jumprelu checkpoint": Saved(
        {"architecture": "jumprelu", "metadata": {"sae_lens_version": "6.47.0"}},
        plain("b_enc", log_threshold=parts()["threshold"].log()),
        lambda t, x: above(centred(t, x), t["log_threshold"].exp()),
    ),
    "6.48 jumprelu checkpoint": Saved(
        {"architecture": "jumprelu", "metadata": {"sae_lens_version": "6.48.0"}},
        plain("b_enc", "threshold"),
        lambda t, x: above(centred(t, x), t["threshold"]),
    ),
    **{
        f"{version} batchtopk checkpoint, key {key}": Saved(
            {
                "architecture": "batchtopk",
                "k": 3.5,
                "metadata": {"sae_lens_version": version},
                **({} if key is None else {"rescale_acts_by_decoder_norm": key}),
            },
            BATCHTOPK,
            (lambda t, x: above(centred(t, x) * norms(t), 1.5))
            if divides
            else (lambda t, x: above(centred(t, x), 1.5)),
            divides,
        )
        for version, key, divides in (
            ("6.1.0", None, False),
            ("6.12.0", None, False),
            ("6.13.1", None, False),
            ("6.14.0", True, True),
            ("6.14.0", None, True),
            ("6.15.0", False, False),
            ("6.54.12", True, True),
        )
    },
    "6.15 matryoshka checkpoint": Saved(
        {
            "architecture": "matryoshka_batchtopk",
            "k": 3.5,
            "matryoshka_widths": [4, 16],
            "metadata": {"sae_lens_version": "6.15.0"},
        },
        BATCHTOPK,
        lambda t, x: above(centred(t, x) * norms(t), 1.5),
        True,
    ),
    "6.14 topk checkpoint": Saved(
        {
            "architecture": "topk",
            "k": K,
            "rescale_acts_by_decoder_norm": True,
            "metadata": {"sae_lens_version": "6.14.0"},
        },
        plain("b_enc"),
        lambda t, x: top(centred(t, x) * norms(t)),
        True,
    ),
}


@pytest.mark.parametrize("name", SAELENS)
def test_saelens_by_version(name: str, tmp_path: Path) -> None:
    saved = SAELENS[name]
    t = saved.tensors()
    save_file(t, tmp_path / "sae_weights.safetensors")
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", **saved.config}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae = load(tmp_path)
    features = saved.features(t, rows())
    W_dec = t["W_dec"] / norms(t)[:, None] if saved.divides_decoder else t["W_dec"]
    check(sae, features, features @ W_dec + t["b_dec"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"metadata": {"sae_lens_version": "new"}}, "no version of SAELens"),
        ({"metadata": {"sae_lens_version": 6}}, "sae_lens_version is not a text"),
        ({"metadata": []}, "metadata is not an object"),
        ({"d_in": None}, "d_in is not a whole number"),
        ({"d_in": 2**40}, "d_in is not a whole number"),
        ({"d_sae": True}, "d_sae is not a whole number"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input is not true or false"),
        ({"architecture": ["topk"]}, "an architecture of SAELens that saescope has not"),
        ({"hook_point": {}, "sae_lens_version": "3.0.0"}, "hook_name is not a text"),
    ],
)
def test_saelens_of_wrong_types(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(plain("b_enc")(), tmp_path / "sae_weights.safetensors")
    whole = {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "metadata": {"sae_lens_version": "6.54.12"},
        **config,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(whole))
    with pytest.raises((ArtefactError, InputError), match=message):
        load(tmp_path)


# ---- sparsify -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "transcode", "site", "target"),
    [
        ("layers.5", None, "blocks.5.hook_resid_post", None),
        ("h.11", False, "blocks.11.hook_resid_post", None),
        ("layers.5.mlp", False, "blocks.5.mlp.hook_out", None),
        ("layers.2.attention", False, "blocks.2.attn.hook_out", None),
        ("embed_tokens", None, "hook_embed", None),
        ("layers.5.mlp", True, "blocks.5.mlp.hook_in", "blocks.5.mlp.hook_out"),
        ("layers.5", True, "blocks.5.hook_resid_pre", "blocks.5.hook_resid_post"),
        ("my_layers.5", None, None, None),
        ("layers_5_ablation", None, None, None),
    ],
)
def test_sparsify(
    name: str, transcode: bool | None, site: str | None, target: str | None, tmp_path: Path
) -> None:
    t = {
        "encoder.weight": draw(D_SAE, D_IN, seed=1),
        "encoder.bias": draw(D_SAE, seed=2),
        "W_dec": draw(D_SAE, D_OUT, seed=3),
        "b_dec": draw(D_OUT, seed=4),
    }
    folder = tmp_path / "layers.9.mlp" / name
    folder.mkdir(parents=True)
    save_file({n: v.bfloat16() for n, v in t.items()}, folder / "sae.safetensors")
    t = {n: v.bfloat16().float() for n, v in t.items()}
    config = {
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": K,
        "d_in": D_IN,
        **({} if transcode is None else {"transcode": transcode}),
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    sae = load(folder)
    assert sae.metadata.get("site") == site
    assert sae.metadata.get("target_site") == target
    seen = rows() if transcode else rows() - t["b_dec"]
    features = top(seen @ t["encoder.weight"].T + t["encoder.bias"])
    check(sae, features, features @ t["W_dec"] + t["b_dec"])


# ---- dictionary_learning --------------------------------------------------------------------


def topk_state(**more: Tensor) -> dict[str, Tensor]:
    return {
        "encoder.weight": draw(D_SAE, D_IN, seed=1),
        "encoder.bias": draw(D_SAE, seed=2),
        "decoder.weight": draw(D_IN, D_SAE, seed=3),
        "b_dec": draw(D_IN, seed=4),
        **more,
    }


@pytest.mark.parametrize("in_weights", [True, False])
@pytest.mark.parametrize(
    ("above_it", "trainer", "site"),
    [
        (
            "resid_post_layer_8",
            {"layer": 8, "submodule_name": "resid_post_layer_8"},
            "blocks.8.hook_resid_post",
        ),
        ("resid_post_layer_8", {"layer": 8}, "blocks.8.hook_resid_post"),
        ("resid_post_ablation", {"layer": 8, "wandb_name": "on_resid_post"}, None),
        ("resid_post_layer_8", {"layer": 4, "submodule_name": "mlp_out_layer_4"}, None),
        ("any", {"layer": 8, "submodule_name": "resid_post_layer_8"}, "blocks.8.hook_resid_post"),
    ],
)
def test_dictionary_learning_topk(
    in_weights: bool, above_it: str, trainer: dict[str, Any], site: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "TopK_pythia-160m-deduped__0108" / above_it / "trainer_10"
    folder.mkdir(parents=True)
    more = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
    t = topk_state(**(more if in_weights else {}))
    torch.save(t, folder / "ae.pt")
    whole = {
        "trainer_class": "TrainerTopK",
        "dict_class": "AutoEncoderTopK",
        "k": K,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "lm_name": "EleutherAI/pythia-160m-deduped",
        **trainer,
    }
    (folder / "config.json").write_text(json.dumps({"trainer": whole, "buffer": {"ctx_len": 128}}))
    sae = load(folder)
    assert sae.metadata.get("site") == site
    assert sae.metadata["model"] == "EleutherAI/pythia-160m-deduped"
    features = top((rows() - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    check(sae, features, features @ t["decoder.weight"].T + t["b_dec"])


def test_dictionary_learning_without_k_or_threshold(tmp_path: Path) -> None:
    torch.save(topk_state(), tmp_path / "ae.pt")

    def described(dict_class: str, **trainer: Any) -> Path:
        config = {"trainer": {"dict_class": dict_class, **trainer}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    with pytest.raises(ArtefactError, match=r"k is neither in the weights nor in config\.json"):
        load(described("AutoEncoderTopK"))
    with pytest.raises(InputError, match="before dictionary_learning estimated a threshold"):
        load(described("BatchTopKSAE", k=K))
    with pytest.raises(ArtefactError, match="layer and submodule_name differ"):
        load(described("AutoEncoderTopK", k=K, layer=3, submodule_name="resid_post_layer_4"))
