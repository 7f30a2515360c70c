"""Model diffing: identical models have no exclusive features; what was planted is recovered."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sae as sae_package
from activations import ActivationStore
from activations.harvesting.join import join
from sae.analysis.model_diff import ModelDiff, Thresholds, diff_models
from sae.architectures.crosscoder import Crosscoder, CrosscoderConfig
from sae.commands.diff_models import MODEL_DIFF, facts_of, read_model_diff
from sae.commands.examination import examine
from sae.training.config import TrainConfig
from sae.training.trainer_config import TrainerConfig
from saescope.__main__ import main
from saescope.errors import ArtefactError, InputError

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
    # feature 0: A 1 (-1) + 3 (-3) = -10, and (1 + 9) 2 of itself; B 1 (0.5) + 3 (-1) + 1 + 9 = 7.5
    # feature 1: A 2 (-1 * -0.5) = 1; B 0 + 4
    assert result.error_ratio.tolist() == pytest.approx([10 / 7.5, 0.25])
    # what it writes to A, 2: B 2 (-2.5) + 10 * 2 = 15, A 2 (-10) + 10 * 4 = 20; feature 1: nothing
    assert result.error_ratio_of_a.tolist() == pytest.approx([0.75, float("nan")], nan_ok=True)
    # feature 0: A 1 * 2 + 3 * 6 = 20, B 1 + 9; feature 1: A 0, B 2 (-1 * -2)
    assert result.reconstruction_ratio.tolist() == [2, 0]
    assert result.reconstruction_ratio_of_a[0] == 0.5
    assert result.rows == 3
    assert result.classes() == ["silent", "silent"]
    assert result.classes(Thresholds(least_rows=1)) == ["other", "not_only_b"]
    assert result.exclusive_to_b(Thresholds(least_rows=1, most_error=0.3)).tolist() == [1]


@pytest.mark.slow
def test_identical_models_have_no_exclusive_features(tmp_path: Path) -> None:
    _, b, _ = activations(OWN)
    _, result = found(tmp_path, b, b)
    assert not {"only_a", "only_b"} & set(result.classes())
    fires = result.counts > 0
    assert fires.sum() >= 40
    assert (result.norm_difference[fires] - 0.5).abs().max() < 0.1


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The run of a crosscoder over two joined stores; B has ten directions that A has not."""
    root = tmp_path_factory.mktemp("planted")
    a, b, own = activations(OWN)
    for name, rows in (("a", a), ("b", b)):
        ActivationStore.from_arrays(root / name, {"x": rows}, storage="float32")
    join(root / "both", {"a": root / "a", "b": root / "b"})
    crosscoder = CrosscoderConfig(d_sae=96, activation="batchtopk", k=3)
    config = TrainConfig(
        harvest=str(root / "both"),
        out=str(root / "run"),
        passes=30.0,
        sae=crosscoder,
        trainer=TrainerConfig(batch_size=512, lr=3e-3),
    )
    sae_package.train(config)
    return root / "run", own


@pytest.mark.slow
def test_what_was_planted_is_recovered_by_the_command(
    planted: tuple[Path, torch.Tensor], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, own = planted
    assert main(["diff-models", str(run), "--out", str(tmp_path / "features.csv")]) == 0
    said = capsys.readouterr().out
    assert "A is a:x, B is b:x; 12,000 rows" in said
    table = read_model_diff(run).to_pandas()
    chosen = table[table["class"] == "only_b"]["feature"].tolist()
    loaded = sae_package.load(run)
    written = torch.nn.functional.normalize(loaded.W_dec[chosen][:, D:], dim=1)
    cosine = (written @ own.T).detach()
    assert (cosine.max(dim=1).values > 0.9).float().mean() >= 0.9, "precision"
    assert (cosine.max(dim=0).values > 0.9).float().mean() >= 0.9, "recall"
    assert f"{len(chosen):>8,}  only_b: only B has it" in said
    assert not (table["class"] == "only_a").any()
    shared = table[table["class"] == "shared"]
    assert len(shared) >= 36
    assert shared["error_ratio"].median() == pytest.approx(1, abs=0.1)
    facts = facts_of(read_model_diff(run))
    assert (facts["sites"], facts["rows"]) == (["a:x", "b:x"], 12_000)
    assert facts["thresholds"]["most_error"] == 0.2
    assert (tmp_path / "features.csv").read_text().startswith('"feature","class","rows"')
    assert examine(run, "run").faults == []
    # other thresholds replace it
    assert main(["diff-models", str(run), "--least-rows", "100000"]) == 0
    assert set(read_model_diff(run).to_pandas()["class"]) == {"silent"}
    (run / MODEL_DIFF).write_bytes(b"PAR1 torn")
    assert [fault[0] for fault in examine(run, "run").faults] == [MODEL_DIFF]
    with pytest.raises(ArtefactError, match="damaged table"):
        read_model_diff(run)
    (run / MODEL_DIFF).unlink()


def test_swapped_models_swap_the_classes() -> None:
    a, b, _ = activations(OWN)
    made = Crosscoder(CrosscoderConfig(d_sae=64, activation="topk", k=3), 2 * D).eval()
    made.metadata = {"sites": ["a", "b"], "site_widths": [D, D]}
    other = made.clone()
    with torch.no_grad():
        for name in ("W_enc_T", "W_dec"):
            weight = getattr(made, name)
            getattr(other, name).copy_(weight.roll(D, dims=1))
    one = diff_models(made, [torch.cat([a, b], dim=1)])
    swapped = diff_models(other, [torch.cat([b, a], dim=1)])
    torch.testing.assert_close(one.norm_difference, 1 - swapped.norm_difference)
    torch.testing.assert_close(one.error_ratio, swapped.error_ratio_of_a)
    torch.testing.assert_close(one.reconstruction_ratio_of_a, swapped.reconstruction_ratio)


def test_a_mean_is_of_no_feature() -> None:
    """A decoder's bias, however large, changes no ratio."""
    a, b, _ = activations(OWN)
    made = Crosscoder(CrosscoderConfig(d_sae=64, activation="topk", k=3), 2 * D).eval()
    made.metadata = {"sites": ["a", "b"], "site_widths": [D, D]}
    rows, mean = torch.cat([a, b], dim=1), 5 * torch.randn(2 * D)
    moved = made.clone()
    with torch.no_grad():
        moved.b_dec.add_(mean)
        moved.b_enc.sub_(moved.W_enc_T @ mean)
    one, other = diff_models(made, [rows]), diff_models(moved, [rows + mean])
    for name in ("error_ratio", "reconstruction_ratio"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-2, atol=1e-2)


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
