"""Temporal SAEs of SAELens: against the definition, one token and one head at a time."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sae
from saescope.errors import ArtefactError, InputError

D_IN, D_SAE, HEADS = 6, 32, 2
CONFIG: dict[str, Any] = {
    "architecture": "temporal",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "device": "cpu",
    "n_heads": HEADS,
    "n_attn_layers": 2,
    "bottleneck_factor": 4,
    "sae_diff_type": "topk",
    "kval_topk": 3,
    "tied_weights": True,
    "apply_b_dec_to_input": True,
    "normalize_activations": "constant_scalar_rescale",
    "activation_normalization_factor": 0.25,
    "reshape_activations": "none",
    "metadata": {"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2"},
}
NARROW = D_SAE // 4
SHAPES = {
    "k_ctx": (NARROW, D_SAE),
    "q_target": (NARROW, D_SAE),
    "v_ctx": (D_SAE, D_SAE),
    "c_proj": (D_SAE, D_SAE),
}


def weights_of(config: dict) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {"W_dec": torch.randn(D_SAE, D_IN), "b_dec": torch.randn(D_IN)}
    if not config["tied_weights"]:
        found["W_enc"] = torch.randn(D_IN, D_SAE)
    for layer in range(config["n_attn_layers"]):
        for name, shape in SHAPES.items():
            found[f"attn_layers.{layer}.{name}.weight"] = torch.randn(shape)
            found[f"attn_layers.{layer}.{name}.bias"] = torch.randn(shape[0])
    return found


def written(folder: Path, **changes: Any) -> tuple[Path, dict, dict[str, Tensor]]:
    config = {**CONFIG, **changes}
    weights = weights_of(config)
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder, config, weights


def by_definition(x: Tensor, config: dict, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of one sequence [pos, d_in] in float64: novel and predicted codes, and the reconstruction."""
    w = {name: value.double() for name, value in weights.items()}
    factor = config["activation_normalization_factor"]
    factor = factor if config["normalize_activations"] != "none" else 1.0
    encoder = w["W_dec"].T if config["tied_weights"] else w["W_enc"]
    rest = x.double() * factor - w["b_dec"] * config["apply_b_dec_to_input"]
    predicted = torch.zeros(len(x), D_SAE, dtype=torch.float64)
    for layer in range(config["n_attn_layers"]):

        def linear(name: str, value: Tensor, layer: int = layer) -> Tensor:
            at = f"attn_layers.{layer}.{name}"
            return w[f"{at}.weight"] @ value + w[f"{at}.bias"]

        z = [torch.relu(encoder.T @ row / (4 * D_IN)) for row in rest]
        past = [torch.zeros_like(z[0]), *z[:-1]]
        left = []
        for t, row in enumerate(rest):
            mixed = []
            for head in range(HEADS):
                own = slice(head * NARROW // HEADS, (head + 1) * NARROW // HEADS)
                values = slice(head * D_SAE // HEADS, (head + 1) * D_SAE // HEADS)
                q = linear("q_target", z[t])[own]
                scores = [q @ linear("k_ctx", past[s])[own] for s in range(t + 1)]
                shares = (torch.stack(scores) / math.sqrt(NARROW / HEADS)).softmax(0)
                mixed.append(
                    sum(shares[s] * linear("v_ctx", past[s])[values] for s in range(t + 1))
                )
            p = torch.relu(linear("c_proj", torch.cat(mixed)))
            direction = p @ w["W_dec"]
            amount = direction @ row / (direction.norm() + 1e-6) ** 2
            predicted[t] += amount * p
            left.append(row - amount * direction)
        rest = torch.stack(left)
    novel = torch.relu(rest @ encoder / (4 * D_IN))
    if config["sae_diff_type"] == "topk":
        least = novel.sort(descending=True).values[:, config["kval_topk"] - 1, None]
        novel = novel.where(novel >= least, 0.0)
    biased = config["apply_b_dec_to_input"] or not config["tied_weights"]
    x_hat = ((novel + predicted) @ w["W_dec"] + w["b_dec"] * biased) / factor
    return novel, predicted, x_hat


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_weights": False, "apply_b_dec_to_input": False},
        {"sae_diff_type": "relu", "kval_topk": None, "normalize_activations": "none"},
        {"apply_b_dec_to_input": False, "n_attn_layers": 1},
    ],
)
def test_it_is_what_the_definition_says(tmp_path: Path, changes: dict) -> None:
    folder, config, weights = written(tmp_path / "sae", **changes)
    analysis = sae.load_predictive(folder)
    x = 3 * torch.randn(2, 5, D_IN)
    found = analysis(x)
    for text in range(2):
        novel, predicted, x_hat = by_definition(x[text], config, weights)
        torch.testing.assert_close(found.novel[text].double(), novel, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.predicted[text].double(), predicted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.x_hat[text].double(), x_hat, rtol=1e-4, atol=1e-4)
    written_by_past = found.predicted @ analysis.W_dec / analysis.config.scale
    torch.testing.assert_close(found.x_predicted, written_by_past)
    if config["kval_topk"]:
        assert int((found.novel > 0).sum(-1).max()) <= 3
    # what comes later says nothing of what was before
    torch.testing.assert_close(analysis(x[:, :3]).x_hat, found.x_hat[:, :3])
    assert not torch.allclose(analysis(x[:, 1:]).x_hat, found.x_hat[:, 1:], atol=1e-3)


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    analysis = sae.load_predictive(written(tmp_path / "sae")[0])
    assert analysis.metadata == {
        "format": "saelens", "site": "blocks.3.hook_resid_post", "model": "gpt2",
    }  # fmt: skip
    assert not analysis.training
    assert not any(each.requires_grad for each in analysis.parameters())
    with pytest.raises(InputError, match=r"reads sequences .*\[batch, pos, 6\]"):
        analysis(torch.randn(5, D_IN))


def test_sae_load_says_who_reads_it(tmp_path: Path) -> None:
    folder = written(tmp_path / "sae")[0]
    with pytest.raises(InputError, match=r"sae\.load_predictive reads it"):
        sae.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, r"sae\.load reads others"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations that saescope has not"),
        ({"sae_diff_type": "batchtopk"}, "sae_diff_type that saescope has not"),
        ({"window": 3}, "window"),
        ({"n_heads": 3}, "is no multiple of bottleneck_factor"),
    ],
)
def test_what_is_not_known(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sae.load_predictive(written(tmp_path / "sae", **changes)[0])


def test_damaged_files(tmp_path: Path) -> None:
    folder, _, weights = written(tmp_path / "sae")
    path = folder / "sae_weights.safetensors"
    save_file({**weights, "b_enc": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"has tensors that no temporal SAE has .*b_enc"):
        sae.load_predictive(folder)
    save_file({name: value for name, value in weights.items() if name != "b_dec"}, path)
    with pytest.raises(ArtefactError, match="b_dec"):
        sae.load_predictive(folder)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ArtefactError):
        sae.load_predictive(folder)
    with pytest.raises(ArtefactError, match="no SAE here"):
        sae.load_predictive(tmp_path / "nowhere")
