"""What every registered architecture must do; the registry decides who is tested."""

import dataclasses

import pytest
import torch

from sae.architectures import architecture, architectures
from sae.base import SparseAutoencoder, TrainingState
from sae.loading import load
from sae.normaliser import Normaliser
from saescope.config import from_dict, to_dict
from saescope.errors import ArtefactError, InputError

KINDS = sorted(architectures())
D_IN, D_SAE = 6, 20


def make(kind: str, *, normaliser: str = "unit_mean_square", seed: int = 0) -> SparseAutoencoder:
    """A small SAE with random weights, biases and a real normaliser."""
    torch.manual_seed(seed)
    cls = architecture(kind)
    names = {field.name for field in dataclasses.fields(cls.Config)}
    sae = cls(cls.Config(d_sae=D_SAE, **({"k": 4} if "k" in names else {})), D_IN)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.3)
    x = rows()
    sae.normaliser = Normaliser.fit(
        normaliser,  # type: ignore[arg-type]
        mean=x.double().mean(0),
        mean_square=float(x.double().square().sum(1).mean()),
    )
    sae.metadata = {"site": "blocks.0.hook_resid_post"}
    return sae.eval()


def rows(n: int = 50, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(n, D_IN, generator=generator) + 3


@pytest.mark.parametrize("kind", KINDS)
class TestContract:
    def test_forward_is_decode_of_encode(self, kind: str) -> None:
        sae, x = make(kind), rows()
        out = sae(x)
        dense = sae.encode(x)
        assert dense.shape == (50, D_SAE)
        assert (dense >= 0).all()
        assert dense.any()
        torch.testing.assert_close(out.x_hat, sae.decode(dense))
        by_hand = dense @ sae.W_dec + sae.normaliser.invert(sae.b_dec)
        torch.testing.assert_close(out.x_hat, by_hand)

    @pytest.mark.parametrize("normaliser", ["none", "unit_mean_square", "centred"])
    def test_fold_changes_nothing_that_can_be_seen(self, kind: str, normaliser: str) -> None:
        sae, x = make(kind, normaliser=normaliser), rows()
        folded = sae.fold()
        assert folded.normaliser.kind == "none"
        torch.testing.assert_close(folded.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(folded(x).x_hat, sae(x).x_hat, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("normaliser", ["unit_mean_square", "centred"])
    def test_features_scale_with_the_data(self, kind: str, normaliser: str) -> None:
        """Fitted on 7 x, the same weights give 7 times the features and reconstructions of x."""
        sae, x = make(kind, normaliser=normaliser), rows()
        features, x_hat = sae.encode(x), sae(x).x_hat
        n = sae.normaliser
        sae.normaliser = Normaliser(n.kind, 7 * n.mean, n.scale / 7, n.variance)
        torch.testing.assert_close(sae.encode(7 * x), 7 * features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(7 * x).x_hat, 7 * x_hat, rtol=1e-5, atol=1e-4)

    def test_permuting_features_permutes_codes(self, kind: str) -> None:
        sae, x = make(kind), rows()
        dense, x_hat = sae.encode(x), sae(x).x_hat
        order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            for name, value in sae.named_parameters():
                if value.shape[0] == D_SAE:
                    sae.get_parameter(name).copy_(value[order].clone())
        torch.testing.assert_close(sae.encode(x), dense[:, order])
        torch.testing.assert_close(sae(x).x_hat, x_hat)

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
        y = sae.normaliser.apply(rows(200))
        state = TrainingState(dead=torch.zeros(D_SAE, dtype=torch.bool))
        optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
        losses = []
        for step in range(30):
            state.step, state.total_steps = step, 30
            output = sae.training_output(y, state)
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
        output = sae.training_output(
            sae.normaliser.apply(x), TrainingState(dead=torch.zeros(D_SAE, dtype=torch.bool))
        )
        assert torch.equal(output.fired, (sae.encode(x) > 0).any(0))

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
        assert (low.float() - exact).norm() < 0.1 * exact.norm()


def test_newer_and_damaged_folders_are_refused(tmp_path) -> None:
    folder = tmp_path / "sae"
    make("topk").save(folder)
    weights = folder / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match="damaged weights"):
        load(folder)
    weights.unlink()
    with pytest.raises(ArtefactError, match="weights are missing"):
        load(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(ArtefactError, match=r"newer saescope \(schema 99"):
        load(folder)
    with pytest.raises(ArtefactError, match="no SAE here"):
        load(tmp_path / "nowhere")


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"given: 'tpk'; allowed: .*relu, topk"):
        architecture("tpk")
