"""Model diffing: identical models have no exclusive features; what was planted is recovered."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sae as sae_package
from activations import ActivationStore
from sae.analysis.model_diff import ModelDiff, diff_models
from sae.architectures.crosscoder import Crosscoder, CrosscoderConfig
from sae.training.config import TrainConfig
from sae.training.trainer_config import TrainerConfig
from saescope.errors import InputError

D, SHARED, OWN, ROWS = 48, 40, 10, 12_000


def activations(own: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of models A and B, [ROWS, D] each, and the directions [own, D] that only B has."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(SHARED + own, D, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    fires = torch.rand(ROWS, SHARED + own, generator=generator) < 0.06
    codes = fires * (1 + torch.rand(ROWS, SHARED + own, generator=generator))
    noise = 0.01 * torch.randn(ROWS, 2 * D, generator=generator)
    a = codes[:, :SHARED] @ directions[:SHARED] + noise[:, :D]
    return a, codes @ directions + noise[:, D:], directions[SHARED:]


def found(folder: Path, a: Tensor, b: Tensor) -> tuple[Crosscoder, ModelDiff]:
    """A crosscoder trained on both models' rows, and its features' scales."""
    ActivationStore.from_arrays(folder / "rows", {"a": a, "b": b}, storage="float32")
    config = TrainConfig(
        harvest=str(folder / "rows"),
        out=str(folder / "run"),
        sites=("a", "b"),
        passes=30.0,
        sae=CrosscoderConfig(d_sae=96, activation="batchtopk", k=3),
        trainer=TrainerConfig(batch_size=512, lr=3e-3),
    )
    sae_package.train(config)
    made = sae_package.load(folder / "run")
    assert isinstance(made, Crosscoder)
    return made, diff_models(made, torch.cat([a, b], dim=1).split(4096))


def test_by_hand() -> None:
    """Two models of width 1; feature 0 is of both, 1 of B alone."""
    made = Crosscoder(CrosscoderConfig(d_sae=2, activation="topk", k=1), 2).eval()
    made.metadata = {"sites": ["a", "b"], "site_widths": [1, 1]}
    with torch.no_grad():
        made.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        made.b_enc.zero_()
        made.b_dec.zero_()
        made.W_dec.copy_(torch.tensor([[2.0, 1.0], [0.0, -1.0]]))
    # feature 0 fires with 1 and 3 on the first rows, feature 1 with 2 on the last
    rows = torch.tensor([[1.0, 1.5], [3.0, 2.0], [-0.5, -2.0]])
    result = diff_models(made, [rows[:1], rows[1:]])
    assert result.counts.tolist() == [2, 1]
    assert result.norm_difference.tolist() == [0.25, 1.0]
    # reconstructions (2, 1), (6, 3), (0, -2); errors (-1, 0.5), (-3, -1), (-0.5, 0)
    # feature 0: A 1 (-1) + 3 (-3) = -10; B 1 (0.5) + 3 (-1) + 1 + 9 = 7.5
    # feature 1: A 2 (-1 * -0.5) = 1; B 0 + 4
    assert result.error_ratio.tolist() == pytest.approx([-10 / 7.5, 0.25])
    # feature 0: A 1 * 2 + 3 * 6 = 20, B 1 + 9; feature 1: A 0, B 2 (-1 * -2)
    assert result.reconstruction_ratio.tolist() == [2, 0]
    assert result.exclusive_to_b().tolist() == []
    assert result.exclusive_to_b(most_error=0.3).tolist() == [1]


def test_identical_models_have_no_exclusive_features(tmp_path: Path) -> None:
    _, b, _ = activations(OWN)
    _, result = found(tmp_path, b, b)
    assert result.exclusive_to_b().tolist() == []
    fires = result.counts > 0
    assert fires.sum() >= 40
    assert (result.norm_difference[fires] - 0.5).abs().max() < 0.1


def test_what_only_one_model_has_is_recovered(tmp_path: Path) -> None:
    """Precision and recall of the ten directions that were planted into B alone: at least 0.9."""
    a, b, own = activations(OWN)
    made, result = found(tmp_path, a, b)
    chosen = result.exclusive_to_b()
    cosine = torch.nn.functional.normalize(made.fold().W_dec[chosen][:, D:], dim=1) @ own.T
    right = cosine.max(dim=1).values > 0.9
    assert right.float().mean() >= 0.9, "precision"
    assert (cosine.max(dim=0).values > 0.9).float().mean() >= 0.9, "recall"


def test_what_latent_scaling_is_for() -> None:
    """A feature that is not written to A, but that A has as well, is not exclusive."""
    made = Crosscoder(CrosscoderConfig(d_sae=1, activation="topk", k=1), 2).eval()
    made.metadata = {"sites": ["a", "b"], "site_widths": [1, 1]}
    with torch.no_grad():
        made.W_enc_T.copy_(torch.tensor([[0.0, 1.0]]))
        made.b_enc.zero_()
        made.b_dec.zero_()
        made.W_dec.copy_(torch.tensor([[0.0, 1.0]]))
    x = torch.rand(50, 1) + 0.5
    alike = diff_models(made, [torch.cat([x, x], dim=1)])
    assert alike.norm_difference.tolist() == [1]
    assert alike.error_ratio.tolist() == pytest.approx([1], abs=1e-5)
    assert alike.exclusive_to_b().tolist() == []
    absent = diff_models(made, [torch.cat([0 * x, x], dim=1)])
    assert absent.exclusive_to_b().tolist() == [0]


def test_wrong_crosscoders_and_rows() -> None:
    made = Crosscoder(CrosscoderConfig(d_sae=2, activation="topk", k=1), 3).eval()
    made.metadata = {"sites": ["a", "b"], "site_widths": [1, 2]}
    with pytest.raises(InputError, match=r"two models' activations.*given: \[1, 2\]"):
        diff_models(made, [torch.zeros(1, 3)])
    made.metadata = {"sites": ["a"], "site_widths": [3]}
    with pytest.raises(InputError, match="two models"):
        diff_models(made, [torch.zeros(1, 3)])
