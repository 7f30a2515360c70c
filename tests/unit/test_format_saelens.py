"""SAELens' files, in every spelling of them: against its formulae written out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.architectures import architecture
from sae.core.base import SparseAutoencoder
from sae.core.normaliser import Normaliser
from sae.formats import format_named
from sae.formats.load import load
from saescope.errors import ArtefactError, InputError

D_IN, D_SAE = 4, 7


def rows() -> Tensor:
    return 2 * torch.randn(30, D_IN, generator=torch.Generator().manual_seed(1)) + 1


def weights(**more: Tensor) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    found = {
        "W_enc": torch.randn(D_IN, D_SAE, generator=g),
        "W_dec": torch.randn(D_SAE, D_IN, generator=g),
        "b_enc": torch.randn(D_SAE, generator=g),
        "b_dec": torch.randn(D_IN, generator=g),
    }
    return {**found, **more}


def config(architecture: str = "standard", **more: Any) -> dict[str, Any]:
    return {
        "architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none", "metadata": {"sae_lens_version": "6.54.12"}, **more,
    }  # fmt: skip


def write(folder: Path, tensors: dict[str, Tensor], described: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({n: v.contiguous() for n, v in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(described))
    return folder


def make(kind: str, **options: Any) -> SparseAutoencoder:
    cls = architecture(kind)
    return cls(cls.Config(d_sae=D_SAE, **options), D_IN)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


def test_two_by_three_by_hand(tmp_path: Path) -> None:
    """x = (1, 2), W_enc rows (1, 0, -1) and (0, 1, 1), b_enc (0, 0.5, 0), b_dec (1, 0)."""
    tensors = {
        "W_enc": torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]]),
        "W_dec": torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]),
        "b_enc": torch.tensor([0.0, 0.5, 0.0]),
        "b_dec": torch.tensor([1.0, 0.0]),
    }
    x = torch.tensor([[1.0, 2.0]])
    for subtracted, features, x_hat in (
        (True, [0.0, 2.5, 2.0], [3.0, 7.0]),  # x - b_dec = (0, 2)
        (False, [1.0, 2.5, 1.0], [3.0, 6.0]),
    ):
        described = {**config(apply_b_dec_to_input=subtracted), "d_in": 2, "d_sae": 3}
        sae = load(write(tmp_path / str(subtracted), tensors, described))
        close(sae.encode(x), torch.tensor([features]))
        close(sae(x).x_hat, torch.tensor([x_hat]))


def test_gated_without_pre_bias(tmp_path: Path) -> None:
    t = weights()
    del t["b_enc"]
    t |= {name: torch.randn(D_SAE) for name in ("b_gate", "b_mag", "r_mag")}
    sae = load(write(tmp_path / "sae", t, config("gated", apply_b_dec_to_input=False)))
    x = rows()
    pre = (x @ t["W_enc"]).double()
    opened = pre + t["b_gate"] > 0
    wanted = opened * torch.relu(pre * t["r_mag"].double().exp() + t["b_mag"])
    close(sae.encode(x), wanted)
    close(sae(x).x_hat, wanted.float() @ t["W_dec"] + t["b_dec"])


def test_layer_norm_is_standardised_with_bessels_correction(tmp_path: Path) -> None:
    t = weights()
    sae = load(write(tmp_path / "sae", t, config(normalize_activations="layer_norm")))
    assert sae.normaliser.kind == "standardised"
    x = rows().double()
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)  # std over d - 1, as SAELens'
    pre = ((x - mean) / (std + 1e-5) - t["b_dec"]) @ t["W_enc"].double() + t["b_enc"]
    features = torch.relu(pre)
    x_hat = (features @ t["W_dec"].double() + t["b_dec"]) * std + mean
    torch.testing.assert_close(sae(x.float()).x_hat, x_hat.float(), rtol=1e-4, atol=1e-4)
    ours = sae.encode(x.float())  # in the model's units: times the deviation
    torch.testing.assert_close(
        ours, (features * x.std(1, correction=0, keepdim=True)).float(), rtol=1e-4, atol=1e-4
    )


def test_topk_that_counts_decoder_norms(tmp_path: Path) -> None:
    t = weights()
    described = config("topk", k=3, rescale_acts_by_decoder_norm=True)
    sae = load(write(tmp_path / "sae", t, described))
    norm = t["W_dec"].norm(dim=1)
    pre = ((rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norm
    value, index = pre.topk(3)
    wanted = torch.zeros_like(pre).scatter_(1, index, value.relu())
    close(sae.encode(rows()), wanted)
    close(sae(rows()).x_hat, (wanted / norm) @ t["W_dec"] + t["b_dec"])


def test_saelens_588_590_a_decoder_row_of_zeros_folds_without_nan(tmp_path: Path) -> None:
    t = weights()
    t["W_dec"][2] = 0
    described = config("topk", k=3, rescale_acts_by_decoder_norm=True)
    sae = load(write(tmp_path / "sae", t, described))
    assert torch.isfinite(sae(rows()).x_hat).all()
    assert not sae.encode(rows())[:, 2].any()


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_training_checkpoint_keeps_its_threshold(name: str, tmp_path: Path) -> None:
    """In training SAELens selects on pre-activations times decoder norms, its threshold too."""
    t = weights(topk_threshold=torch.tensor(0.7, dtype=torch.float64))
    described = config(
        name, k=2.5, rescale_acts_by_decoder_norm=True, topk_threshold_lr=0.01,
        decoder_init_norm=0.1, matryoshka_widths=[3, 7], use_sparse_activations=False,
    )  # fmt: skip
    sae = load(write(tmp_path / "sae", t, described))
    pre = ((rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * t["W_dec"].norm(dim=1)
    close(sae.encode(rows()), pre * (pre > 0.7))


def test_jumprelu_checkpoint_with_log_threshold(tmp_path: Path) -> None:
    t = weights(log_threshold=torch.full((D_SAE,), 0.5).log())
    sae = load(write(tmp_path / "sae", t, config("jumprelu")))
    pre = (rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    close(sae.encode(rows()), pre * (pre > 0.5))


def test_negative_thresholds_do_not_let_negative_activations_through(tmp_path: Path) -> None:
    t = weights(threshold=torch.full((D_SAE,), -1.0))
    sae = load(write(tmp_path / "sae", t, config("jumprelu")))
    pre = (rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    close(sae.encode(rows()), pre.relu())


def test_matching_pursuit_stops_by_saelens_rules(tmp_path: Path) -> None:
    """A row ends after a step without a new feature, or with a residual below the threshold."""
    t = {name: value for name, value in weights().items() if "enc" not in name}
    t["W_dec"] /= t["W_dec"].norm(dim=1, keepdim=True)
    described = config("matching_pursuit", residual_threshold=0.3, max_iterations=6,
                       stop_on_duplicate_support=True)  # fmt: skip
    sae = load(write(tmp_path / "sae", t, described))
    wanted = torch.zeros(len(rows()), D_SAE)
    for row, x in enumerate(rows()):
        left = x - t["b_dec"]
        for _ in range(6):
            along = t["W_dec"] @ left
            best = int(along.argmax())
            c, known = along[best].clamp_min(0), bool(wanted[row, best])
            wanted[row, best] += c
            left = left - c * t["W_dec"][best]
            if known or c == 0 or left.norm() < 0.3:
                break
    close(sae.encode(rows()), wanted)


def test_configuration_before_version_6(tmp_path: Path) -> None:
    """Whole runs' configurations: other names, a boolean, k in activation_fn_kwargs."""
    t = weights(scaling_factor=torch.ones(D_SAE))
    old = {
        "hook_point": "blocks.2.hook_resid_pre", "model_name": "gpt2", "d_in": D_IN,
        "d_sae": D_SAE, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2},
        "normalize_activations": False, "lr": 1e-3, "l1_coefficient": 5, "dtype": "torch.float32",
    }  # fmt: skip
    sae = load(write(tmp_path / "sae", t, old))
    assert sae.metadata["site"] == "blocks.2.hook_resid_pre"
    pre = (rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    value, index = pre.topk(2)
    close(sae.encode(rows()), torch.zeros_like(pre).scatter_(1, index, value.relu()))


def test_a_finetuned_scale_acts_on_what_features_write(tmp_path: Path) -> None:
    scale = torch.linspace(0.5, 2, D_SAE)
    t = weights(scaling_factor=scale)
    old = {"d_in": D_IN, "d_sae": D_SAE, "finetuning_scaling_factor": True}
    sae = load(write(tmp_path / "sae", t, old))
    features = torch.relu((rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    close(sae.encode(rows()), features)
    close(sae(rows()).x_hat, (features * scale) @ t["W_dec"] + t["b_dec"])
    write(tmp_path / "sae", t, {**old, "finetuning_scaling_factor": False})
    with pytest.raises(InputError, match="their meaning is not clear"):
        load(tmp_path / "sae")


def test_saelens_354_467_a_scale_that_was_not_folded_is_never_ignored(tmp_path: Path) -> None:
    t, s = weights(), 0.3
    described = config(normalize_activations="expected_average_only_in")
    folder = write(tmp_path / "sae", t, described)
    with pytest.raises(InputError, match=r"before the scale of its inputs was folded.*input_scale"):
        load(folder)
    features = torch.relu((s * rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    x_hat = (features @ t["W_dec"] + t["b_dec"]) / s
    given = load(folder, input_scale=s)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": s}))
    for sae in (given, load(folder)):
        close(sae.encode(rows()), features)
        close(sae(rows()).x_hat, x_hat)


@pytest.mark.parametrize("kind", ["jumprelu", "batchtopk"])
@pytest.mark.parametrize("normaliser", ["unit_mean_square", "sqrt_d", "centred"])
def test_saelens_212_381_439_763_the_threshold_is_folded_with_the_norm(
    kind: str, normaliser: Any, tmp_path: Path
) -> None:
    """What SAELens computes with our file, on raw activations, is what we compute."""
    torch.manual_seed(0)
    sae = make(kind, **({"k": 2.0} if kind == "batchtopk" else {}))
    x = rows()
    sae.normaliser = Normaliser.fit(
        normaliser, mean=x.double().mean(0), sample=x,
        mean_square=float(x.double().square().sum(1).mean()),
    )  # fmt: skip
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.get_buffer("threshold").fill_(0.4) if kind == "batchtopk" else sae.get_parameter(
            "threshold"
        ).uniform_(0.2, 0.6)
    format_named("saelens").write(sae, tmp_path / "out")
    t = load_file(tmp_path / "out" / "sae_weights.safetensors")
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    features = pre.relu() * (pre > t["threshold"])
    assert features.any()
    close(sae.encode(x), features)
    close(sae(x).x_hat, features @ t["W_dec"] + t["b_dec"])


def test_defect_11_the_inference_threshold_is_in_the_file(tmp_path: Path) -> None:
    """overcomplete's BatchTopK keeps it outside its state dict, and loses it on loading."""
    sae = make("batchtopk", k=2.0)
    sae.get_buffer("threshold").fill_(0.9)
    for name in ("saescope", "saelens", "gemma_scope", "dictionary_learning"):
        format_named(name).write(sae, tmp_path / name)
        close(load(tmp_path / name).encode(rows()), sae.encode(rows()))
        assert (sae.encode(rows()) > 0).sum() < (rows() @ sae.W_enc > 0).sum()


@pytest.mark.parametrize(
    ("more", "tensors", "message"),
    [
        ({"architecture": "other"}, {}, "given: 'other'; allowed: standard, gated"),
        ({"normalize_activations": "constant_norm_rescale"}, {}, "normalisation of each input"),
        ({"new_switch": True}, {}, r"does not know.*new_switch"),
        ({"architecture": "topk"}, {}, "k is missing"),
        ({"architecture": "transcoder"}, {}, "cannot be subtracted from its input"),
        ({}, {"W_new": torch.ones(2)}, r"does not know.*W_new"),
        ({}, {"b_enc": None}, "b_enc is missing"),
        ({}, {"W_dec": torch.ones(D_IN, D_SAE)}, "W_dec is transposed"),
        ({}, {"b_dec": torch.full((D_IN,), torch.nan)}, "b_dec is not finite"),
    ],
)
def test_saelens_308_553_608_nothing_is_misread_in_silence(
    more: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    t = {n: v for n, v in {**weights(), **tensors}.items() if v is not None}
    folder = write(tmp_path / "sae", t, {**config(), **more})
    with pytest.raises((InputError, ArtefactError), match=message):
        load(folder)


def test_transcoders_of_kinds_that_saelens_has_not(tmp_path: Path) -> None:
    transcoder = make("transcoder", activation="topk", k=2)
    with pytest.raises(InputError, match=r"given: 'topk'; allowed: relu, jumprelu"):
        format_named("saelens").write(transcoder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_read_as_version_6(tmp_path: Path) -> None:
    sae = make("topk", k=2)
    sae.metadata = {"site": "blocks.1.attn.hook_z"}
    format_named("saelens").write(sae, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert described["metadata"]["sae_lens_version"].startswith("6.")
    assert described["reshape_activations"] == "hook_z"
    assert described["k"] == 2
    assert described["rescale_acts_by_decoder_norm"] is False
