"""What every registered architecture must do; the registry decides who is tested."""

import dataclasses
from typing import Any

import pytest
import torch

from sae.architectures import architecture, list_architectures
from sae.core.base import SparseAutoencoder, TrainingState
from sae.core.batch import RawBatch, TrainingBatch
from sae.core.normaliser import Normaliser
from sae.formats.load import load
from sae.training.batch_maker import BatchMaker, LossConfig
from saescope.config import from_dict, to_dict
from saescope.errors import ArtefactError, InputError

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "transcoder jumprelu": ("transcoder", {"activation": "jumprelu"}),
    "skip_transcoder jumprelu": ("skip_transcoder", {"activation": "jumprelu"}),
}
"""architectures with an option that makes them another thing"""
KINDS = [*sorted(list_architectures()), *VARIANTS]
D_IN, D_OUT, D_SAE, ROWS = 6, 5, 20, 50
NORMALISERS = ["none", "unit_mean_square", "sqrt_d", "centred", "standardised"]
SETTINGS: dict[str, dict[str, Any]] = {"msae": {"ks": (2, 4, 8)}}
"""what an architecture needs besides d_sae and k to be small"""
BIASES = {"b_enc": 0.1, "b_gate": 0.1, "b_mag": 0.1, "r_mag": 0.1, "b_dec": 0.3, "W_skip": 0.2}


def make(kind: str, *, normaliser: str = "unit_mean_square", seed: int = 0) -> SparseAutoencoder:
    """A small SAE with random weights, biases and real normalisers."""
    torch.manual_seed(seed)
    kind, variant = VARIANTS.get(kind, (kind, {}))
    cls = architecture(kind)
    names = {field.name for field in dataclasses.fields(cls.Config)}
    options = {"d_sae": D_SAE, **({"k": 4} if "k" in names else {}), **SETTINGS.get(kind, {})}
    options |= variant
    sae = cls(cls.Config(**options), D_IN, D_OUT if cls.transcodes else None)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in BIASES:
                parameter.normal_(std=BIASES[name])
        if not sae.W_dec.any():  # transcoders start there, and then nothing would be decoded
            for name, parameter in sae.named_parameters():
                if name.startswith(("W_dec", "decoders")):
                    parameter.normal_(std=0.3)
    x = rows()
    if normaliser == "standardised" and (cls.concatenates or cls.transcodes):
        pytest.skip("several sites have no one vector to standardise")
    if cls.concatenates and not cls.transcodes:
        parts = [fit(normaliser, site) for site in (x[:, :4], 3 * x[:, 4:])]
        sae.normaliser = Normaliser.side_by_side(parts)
        sae.metadata["site_widths"] = [4, 2]
    else:
        sae.normaliser = fit(normaliser, x)
    if cls.transcodes:
        sae.output_normaliser = fit(normaliser, targets(x))
    sae.metadata["site"] = "blocks.0.hook_resid_post"
    return sae.eval()


def fit(kind: str, x: torch.Tensor) -> Normaliser:
    return Normaliser.fit(
        kind,  # type: ignore[arg-type]
        mean=x.double().mean(0),
        mean_square=float(x.double().square().sum(1).mean()),
        sample=x,
    )


def rows(n: int = ROWS, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(n, D_IN, generator=generator) + 3


def targets(x: torch.Tensor) -> torch.Tensor:
    """What a transcoder is to make of x."""
    weights = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(2))
    return torch.relu(x @ weights) + 1


def batch_of(sae: SparseAutoencoder, x: torch.Tensor) -> TrainingBatch:
    raw = RawBatch(x, targets(x) if sae.transcodes else None, labels=torch.arange(len(x)))
    return BatchMaker(sae, LossConfig()).make(raw, torch.Generator())


def state_of(sae: SparseAutoencoder) -> TrainingState:
    return TrainingState(
        dead=torch.zeros(sae.d_sae, dtype=torch.bool), generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("kind", KINDS)
class TestContract:
    def test_forward_is_decode_of_encode(self, kind: str) -> None:
        sae, x = make(kind), rows()
        out = sae(x)
        dense = sae.encode(x)
        assert dense.shape == (ROWS, D_SAE)
        assert sae.signed or (dense >= 0).all()
        assert dense.any()
        torch.testing.assert_close(out.x_hat, sae.decode(dense, like=x))
        folded = sae.fold()
        by_hand = dense @ folded.W_dec + folded.b_dec
        if "W_skip" in dict(folded.named_parameters()):
            by_hand = by_hand + x @ folded.get_parameter("W_skip")
        torch.testing.assert_close(out.x_hat, by_hand, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("normaliser", NORMALISERS)
    def test_fold_changes_nothing_that_can_be_seen(self, kind: str, normaliser: str) -> None:
        """Norm folding is the peers' most repeated bug (SAELens 354, 212, 381, 222, 467, 439)."""
        sae, x = make(kind, normaliser=normaliser), rows()
        folded = sae.fold()
        assert folded.normaliser.kind == (
            "standardised" if normaliser == "standardised" else "none"
        )
        torch.testing.assert_close(folded.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(folded(x).x_hat, sae(x).x_hat, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("normaliser", NORMALISERS[:-1])
    def test_unfold_is_the_inverse_of_fold(self, kind: str, normaliser: str) -> None:
        sae = make(kind, normaliser=normaliser)
        back = sae.fold().unfold(sae.normaliser, sae.output_normaliser)
        for name, value in sae.state_dict().items():
            torch.testing.assert_close(back.state_dict()[name], value, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("normaliser", ["unit_mean_square", "centred"])
    def test_features_scale_with_the_data(self, kind: str, normaliser: str) -> None:
        """Fitted on 7 x, the same weights give 7 times the features and reconstructions of x."""
        sae, x = make(kind, normaliser=normaliser), rows()
        features, x_hat = sae.encode(x), sae(x).x_hat
        sae.normaliser = scaled(sae.normaliser)
        if sae.output_normaliser is not None:
            sae.output_normaliser = scaled(sae.output_normaliser)
        torch.testing.assert_close(sae.encode(7 * x), 7 * features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(7 * x).x_hat, 7 * x_hat, rtol=1e-5, atol=2e-4)

    def test_permuting_features_permutes_codes(self, kind: str) -> None:
        sae, x = make(kind), rows()
        dense, x_hat = sae.encode(x), sae(x).x_hat
        order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            for value in (*sae.parameters(), *sae.buffers()):
                if value.ndim and value.shape[0] == D_SAE:
                    value.copy_(value[order].clone())
        torch.testing.assert_close(sae.encode(x), dense[:, order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae(x).x_hat, x_hat, rtol=1e-4, atol=1e-4)

    def test_saved_and_loaded_is_the_same_to_the_bit(self, kind: str, tmp_path) -> None:
        sae, x = make(kind), rows()
        sae.save(tmp_path / "sae")
        again = load(tmp_path / "sae")
        assert again.config == sae.config
        assert again.metadata == sae.metadata
        assert torch.equal(again.encode(x), sae.encode(x))
        assert torch.equal(again(x).x_hat, sae(x).x_hat)

    def test_objective_learns(self, kind: str) -> None:
        """A few steps of gradient descent lower the loss, and every parameter gets a gradient."""
        sae = make(kind).train()
        batch, state = batch_of(sae, rows(200)), state_of(sae)
        optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
        losses = []
        for step in range(30):
            state.step, state.total_steps = step, 30
            output = sae.training_output(batch, state)
            optimiser.zero_grad()
            output.loss.backward()
            sae.before_step()
            if step == 0:
                for name, value in sae.named_parameters():
                    assert value.grad is not None, name
                    assert value.grad.any(), name
            optimiser.step()
            sae.after_step()
            losses.append(float(output.terms["fvu"]))
        assert losses[-1] < 0.8 * losses[0]

    def test_fired_is_what_fired(self, kind: str) -> None:
        sae, x = make(kind), rows()
        output = sae.training_output(batch_of(sae, x), state_of(sae))
        assert output.counts.shape == (D_SAE,)
        assert output.y_hat.shape == (ROWS, sae.d_out)
        assert float(output.l0) == pytest.approx(float(output.counts.sum()) / ROWS)
        if not sae.batch_level:
            assert torch.equal(output.counts, (sae.encode(x) != 0).sum(0))

    def test_configuration_round_trip_and_unknown_keys(self, kind: str) -> None:
        config = make(kind).config
        assert from_dict(type(config), to_dict(config), "test") == config
        with pytest.raises(InputError, match=r"unknown key 'd_saee'.*known here: .*d_sae"):
            from_dict(type(config), {**to_dict(config), "d_saee": 3}, "test")

    def test_wrong_shape_is_one_clear_error(self, kind: str) -> None:
        with pytest.raises(InputError, match=r"given: \(3, 7\); allowed: \[batch, 6\]"):
            make(kind).encode(torch.zeros(3, 7))

    def test_bfloat16_weights_run(self, kind: str) -> None:
        sae, x = make(kind), rows()
        exact = sae(x).x_hat
        low = sae.to(torch.bfloat16)(x.bfloat16()).x_hat
        assert low.dtype == torch.bfloat16
        if kind == "matching_pursuit":  # rounding flips choices that are nearly tied
            errors = [(each.float() - x).norm() for each in (low, exact)]
            assert errors[0] < 1.05 * errors[1]
        else:
            assert (low.float() - exact).norm() < 0.1 * exact.norm()

    def test_thresholds_keep_float32_under_bfloat16(self, kind: str) -> None:
        sae = make(kind)
        before = {n: t.clone() for n, t in sae.state_dict().items() if "threshold" in n}
        sae.to(torch.bfloat16)
        for name, value in before.items():
            assert torch.equal(sae.state_dict()[name], value), name
            assert sae.state_dict()[name].dtype == value.dtype, name


def scaled(normaliser: Normaliser) -> Normaliser:
    """The normaliser that 7 x would have."""
    n = normaliser
    return Normaliser(n.kind, 7 * n.mean, n.scale / 7, n.variance)


def test_newer_and_damaged_folders_are_refused(tmp_path) -> None:
    folder = tmp_path / "sae"
    make("topk").save(folder)
    weights = folder / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match=r"weights\.safetensors: damaged weights"):
        load(folder)
    weights.unlink()
    with pytest.raises(
        ArtefactError, match=r"weights\.safetensors: damaged weights: the file is missing"
    ):
        load(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"schema": 3', '"schema": 99'))
    with pytest.raises(ArtefactError, match=r"newer saescope \(schema 99"):
        load(folder)
    with pytest.raises(ArtefactError, match="no SAE here"):
        load(tmp_path / "nowhere")


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"given: 'tpk'; allowed: .*relu, .*topk"):
        architecture("tpk")
