"""Gemma Scope, sparsify and dictionary_learning: against their formulae written out by hand."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae.formats import format_named
from sae.formats.load import load
from saescope.errors import ArtefactError, InputError
from tests.marker import Marker

D_IN, D_SAE, D_OUT = 4, 7, 3


def rows() -> Tensor:
    return 2 * torch.randn(30, D_IN, generator=torch.Generator().manual_seed(1)) + 1


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


# ---- Gemma Scope ----------------------------------------------------------------------------


def gemma(folder: Path, *, d_out: int = D_IN, lower: bool = False, **more: Any) -> dict[str, Any]:
    t = {
        "W_enc": draw(D_IN, D_SAE, seed=1), "W_dec": draw(D_SAE, d_out, seed=2),
        "b_enc": draw(D_SAE, seed=3), "b_dec": draw(d_out, seed=4),
        "threshold": draw(D_SAE, seed=5).abs(), **more,
    }  # fmt: skip
    named = {f"w_{n[2:]}" if lower and n[:2] == "W_" else n: v.numpy() for n, v in t.items()}
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **named)
    return t


@pytest.mark.parametrize("lower", [False, True])
def test_gemma_scope_does_not_subtract_b_dec(lower: bool, tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    t = gemma(folder, lower=lower)
    sae = load(folder)
    pre = rows() @ t["W_enc"] + t["b_enc"]
    features = pre.relu() * (pre > t["threshold"])
    assert features.any()
    close(sae.encode(rows()), features)
    close(sae(rows()).x_hat, features @ t["W_dec"] + t["b_dec"])
    assert sae.metadata["site"] == "blocks.12.hook_resid_post"
    assert sae.metadata["model"] == "google/gemma-2-2b"
    assert sae.metadata["claimed"] == {"l0": 82.0}


def test_gemma_scope_embedding_reads_the_scaled_embedding(tmp_path: Path) -> None:
    t = gemma(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6")
    sae = load(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6")
    raw = rows()
    pre = raw @ t["W_enc"] + t["b_enc"]
    features = pre.relu() * (pre > t["threshold"])
    close(sae.encode(raw * D_IN**0.5), features)
    close(sae(raw * D_IN**0.5).x_hat, (features @ t["W_dec"] + t["b_dec"]) * D_IN**0.5)
    assert sae.metadata["site"] == "hook_embed"


def test_gemma_scope_transcoder(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "average_l0_50"
    t = gemma(folder, d_out=D_OUT)
    sae = load(folder)
    pre = rows() @ t["W_enc"] + t["b_enc"]
    close(sae(rows()).x_hat, (pre.relu() * (pre > t["threshold"])) @ t["W_dec"] + t["b_dec"])
    assert sae.metadata["site"] == "blocks.3.ln2.hook_normalized"
    assert sae.metadata["target_site"] == "blocks.3.hook_mlp_out"


def test_gemma_scope_2(tmp_path: Path) -> None:
    """params.safetensors, lower-case keys, an affine skip connection [d_in, d_out]."""
    t = {
        "w_enc": draw(D_IN, D_SAE, seed=1), "w_dec": draw(D_SAE, D_OUT, seed=2),
        "b_enc": draw(D_SAE, seed=3), "b_dec": draw(D_OUT, seed=4),
        "threshold": draw(D_SAE, seed=5).abs(), "affine_skip_connection": draw(D_IN, D_OUT),
    }  # fmt: skip
    save_file(t, tmp_path / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "l0": 20}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sae = load(tmp_path)
    pre = rows() @ t["w_enc"] + t["b_enc"]
    features = pre.relu() * (pre > t["threshold"])
    x_hat = features @ t["w_dec"] + t["b_dec"] + rows() @ t["affine_skip_connection"]
    close(sae(rows()).x_hat, x_hat)
    assert sae.metadata["claimed"] == {"l0": 20.0}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "topk"}))
    with pytest.raises(InputError, match="given: 'topk'; allowed: jump_relu"):
        load(tmp_path)


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    sign = tmp_path / "executed"
    (tmp_path / "npz").mkdir()
    objects = np.empty(1, dtype=object)
    objects[0] = Marker(sign)
    with (tmp_path / "npz" / "params.npz").open("wb") as stream:
        np.savez(stream, W_enc=objects)
    (tmp_path / "pt").mkdir()
    with (tmp_path / "pt" / "ae.pt").open("wb") as stream:
        torch.save({"bias": Marker(sign)}, stream, pickle_module=pickle)
    for name in ("npz", "pt"):
        with pytest.raises(ArtefactError, match="damaged weights"):
            load(tmp_path / name)
    assert not sign.exists()


def test_gemma_scope_factors_of_unknown_meaning_are_refused(tmp_path: Path) -> None:
    gemma(tmp_path / "a", scaling_factor=torch.ones(D_SAE))
    load(tmp_path / "a")
    gemma(tmp_path / "b", scaling_factor=2 * torch.ones(D_SAE))
    with pytest.raises(InputError, match="meaning is not published"):
        load(tmp_path / "b")


# ---- sparsify -------------------------------------------------------------------------------


def sparsify(folder: Path, *, d_out: int = D_IN, skip: bool = False, **config: Any) -> dict:
    t = {
        "encoder.weight": draw(D_SAE, D_IN, seed=1), "encoder.bias": draw(D_SAE, seed=2),
        "W_dec": draw(D_SAE, d_out, seed=3), "b_dec": draw(d_out, seed=4),
    }  # fmt: skip
    if skip:
        t["W_skip"] = draw(d_out, D_IN, seed=5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(t, folder / "sae.safetensors")
    described = {"d_in": D_IN, "k": 3, "num_latents": D_SAE, "expansion_factor": 32, **config}
    (folder / "cfg.json").write_text(json.dumps(described))
    return t


def top(pre: Tensor, k: int) -> Tensor:
    value, index = pre.relu().topk(k)
    return torch.zeros_like(pre).scatter_(1, index, value)


def test_defect_5_sparsifys_decoder_is_not_transposed(tmp_path: Path) -> None:
    """SAELens 6.18 took W_dec, a feature a row, for its transpose."""
    folder = tmp_path / "layers.5"
    t = sparsify(folder)
    sae = load(folder)
    features = top((rows() - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 3)
    close(sae.encode(rows()), features)
    close(sae(rows()).x_hat, features @ t["W_dec"] + t["b_dec"])
    assert sae.metadata["site"] == "blocks.5.hook_resid_post"
    save_file({**t, "W_dec": t["W_dec"].T.contiguous()}, folder / "sae.safetensors")
    with pytest.raises(ArtefactError, match="W_dec is transposed"):
        load(folder)


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_transcoders_do_not_subtract_b_dec(skip: bool, tmp_path: Path) -> None:
    t = sparsify(tmp_path / "mlp", d_out=D_OUT, skip=skip, transcode=True)
    sae = load(tmp_path / "mlp")
    features = top(rows() @ t["encoder.weight"].T + t["encoder.bias"], 3)
    x_hat = features @ t["W_dec"] + t["b_dec"]
    close(sae(rows()).x_hat, x_hat + (rows() @ t["W_skip"].T if skip else 0))


def test_sparsify_skip_connection_of_an_autoencoder(tmp_path: Path) -> None:
    t = sparsify(tmp_path / "mlp", skip=True)
    sae = load(tmp_path / "mlp")
    features = top((rows() - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 3)
    close(sae(rows()).x_hat, features @ t["W_dec"] + t["b_dec"] + rows() @ t["W_skip"].T)


def test_sparsify_signed(tmp_path: Path) -> None:
    t = sparsify(tmp_path / "h", signed=True)
    pre = (rows() - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    index = pre.abs().topk(3).indices
    wanted = torch.zeros_like(pre).scatter_(1, index, pre.gather(1, index))
    close(load(tmp_path / "h").encode(rows()), wanted)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "groupmax"}, "given: 'groupmax'; allowed: topk"),
        ({"gram_lookup": True}, "reads more than its hookpoint"),
        ({"new_switch": 1}, "does not know.*new_switch"),
    ],
)
def test_sparsify_what_cannot_be_represented(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sparsify(tmp_path / "h", **config)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "h")


# ---- dictionary_learning --------------------------------------------------------------------


def dictionary(folder: Path, kind: str | None, t: dict[str, Tensor], **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(t, folder / "ae.pt")
    if kind:
        config = {"trainer": {"dict_class": kind, **trainer}, "buffer": {"ctx_len": 128}}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def linear(**more: Tensor) -> dict[str, Tensor]:
    return {
        "encoder.weight": draw(D_SAE, D_IN, seed=1), "encoder.bias": draw(D_SAE, seed=2),
        "decoder.weight": draw(D_IN, D_SAE, seed=3), **more,
    }  # fmt: skip


def matrices(**more: Tensor) -> dict[str, Tensor]:
    return {
        "W_enc": draw(D_IN, D_SAE, seed=1), "b_enc": draw(D_SAE, seed=2),
        "W_dec": draw(D_SAE, D_IN, seed=3), "b_dec": draw(D_IN, seed=4), **more,
    }  # fmt: skip


def check(folder: Path, features: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
    sae = load(folder)
    assert features.any()
    close(sae.encode(rows()), features)
    close(sae(rows()).x_hat, features @ W_dec + b_dec)


def test_dictionary_learning_autoencoders(tmp_path: Path) -> None:
    b = draw(D_IN, seed=4)
    t = linear(bias=b)
    features = torch.relu((rows() - b) @ t["encoder.weight"].T + t["encoder.bias"])
    check(dictionary(tmp_path / "a", "AutoEncoder", t), features, t["decoder.weight"].T, b)
    t = linear(**{"decoder.bias": b})  # the April update does not subtract it
    features = torch.relu(rows() @ t["encoder.weight"].T + t["encoder.bias"])
    check(dictionary(tmp_path / "b", None, t), features, t["decoder.weight"].T, b)


def test_dictionary_learning_gated(tmp_path: Path) -> None:
    t = linear(decoder_bias=draw(D_IN, seed=4), r_mag=draw(D_SAE, seed=5),
               gate_bias=draw(D_SAE, seed=6), mag_bias=draw(D_SAE, seed=7))  # fmt: skip
    del t["encoder.bias"]
    pre = (rows() - t["decoder_bias"]) @ t["encoder.weight"].T
    opened = pre + t["gate_bias"] > 0
    features = opened * torch.relu(t["r_mag"].exp() * pre + t["mag_bias"])
    folder = dictionary(tmp_path / "a", "GatedAutoEncoder", t)
    check(folder, features, t["decoder.weight"].T, t["decoder_bias"])


def test_dictionary_learning_topk_and_batchtopk(tmp_path: Path) -> None:
    b = draw(D_IN, seed=4)
    t = linear(b_dec=b, k=torch.tensor(3, dtype=torch.int), threshold=torch.tensor(0.8))
    pre = (rows() - b) @ t["encoder.weight"].T + t["encoder.bias"]
    W_dec = t["decoder.weight"].T
    check(dictionary(tmp_path / "a", "AutoEncoderTopK", t, k=3), top(pre, 3), W_dec, b)
    check(dictionary(tmp_path / "b", "BatchTopKSAE", t, k=3), pre * (pre > 0.8), W_dec, b)
    early = {**t, "threshold": torch.tensor(-1.0)}  # before its estimate begins
    check(dictionary(tmp_path / "c", "BatchTopKSAE", early), pre.relu(), W_dec, b)
    with pytest.raises(InputError, match=r"fit several dictionaries .*AutoEncoderTopK"):
        load(dictionary(tmp_path / "d", None, t))
    with pytest.raises(ArtefactError, match="k differs between the weights and"):
        load(dictionary(tmp_path / "e", "AutoEncoderTopK", t, k=4))
    with pytest.raises(ArtefactError, match="not of the dictionary that"):
        load(dictionary(tmp_path / "f", "JumpReluAutoEncoder", t))


def test_dictionary_learning_jumprelu_and_matryoshka(tmp_path: Path) -> None:
    theta = draw(D_SAE, seed=5).abs()
    t = matrices(threshold=theta)
    pre = rows() @ t["W_enc"] + t["b_enc"]
    folder = dictionary(tmp_path / "a", "JumpReluAutoEncoder", t)
    check(folder, pre.relu() * (pre > theta), t["W_dec"], t["b_dec"])
    t = matrices(threshold=torch.tensor(0.8), k=torch.tensor(3), group_sizes=torch.tensor([3, 4]))
    pre = (rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    folder = dictionary(tmp_path / "b", "MatryoshkaBatchTopKSAE", t)
    check(folder, pre * (pre > 0.8), t["W_dec"], t["b_dec"])


def test_dictionary_learning_unknown_dictionary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="given: 'IdentityDict'; allowed: AutoEncoder"):
        load(dictionary(tmp_path / "a", "IdentityDict", linear()))
    with pytest.raises(ArtefactError, match="of no dictionary that saescope has"):
        load(dictionary(tmp_path / "b", None, {"what": torch.ones(2)}))
    with pytest.raises(ArtefactError, match="not a state dict of tensors"):
        load(dictionary(tmp_path / "c", None, {"k": 3}))  # type: ignore[dict-item]


def test_formats_hold_what_their_libraries_can_load(tmp_path: Path) -> None:
    """dictionary_learning's loaders want k as an integer tensor and a threshold with it."""
    from sae.architectures.topk import TopKConfig, TopKSAE

    format_named("dictionary_learning").write(TopKSAE(TopKConfig(d_sae=D_SAE, k=2), D_IN),
                                              tmp_path / "out")  # fmt: skip
    state = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    assert state["k"].dtype == torch.int
    assert set(state) == {*linear(), "b_dec", "k", "threshold"}
