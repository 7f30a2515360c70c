"""Rows that break formulae, on every architecture: not finite, all equal, a single one, masked."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import kernels
from sae.architectures._auxk import AuxKSAE
from sae.architectures._batch_selection import BatchSelectionSAE
from sae.core.base import SparseAutoencoder, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.losses import Reconstruction
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError
from tests.contracts.test_architectures import D_SAE, KINDS, make, rows, targets


def with_options(sae: SparseAutoencoder, **options: Any) -> SparseAutoencoder:
    """The SAE with other settings, of those that its configuration has."""
    names = {field.name for field in dataclasses.fields(sae.config)}
    chosen = {name: value for name, value in options.items() if name in names}
    sae.config = dataclasses.replace(sae.config, **chosen)
    return sae


def batch_at_scale(sae: SparseAutoencoder, y: Tensor) -> TrainingBatch:
    target = targets(y) if sae.transcodes else y
    return TrainingBatch(y=y, target=target, variance=1.0, labels=torch.arange(len(y)))


def state_of(dead: Tensor) -> TrainingState:
    return TrainingState(dead=dead, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
class TestEveryArchitecture:
    @pytest.mark.parametrize("backend", kernels.available())
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_row_that_is_not_finite_is_one_clear_error(
        self, kind: str, backend: str, bad: float
    ) -> None:
        """Thresholds compare a NaN to nothing: it would be a row without features (L0 0)."""
        sae, x = make(kind), rows(5)
        x[3, 1] = bad
        message = r"sae: rows of activations that are not finite: 1 of 5, the first is row 3"
        with kernels.using(backend):
            for call in (sae.encode, sae.encode_sparse, sae.forward, sae.fold().forward):
                with pytest.raises(InputError, match=message):
                    call(x)

    def test_equal_rows_have_a_loss_and_gradients(self, kind: str) -> None:
        sae = with_options(make(kind).train(), auxiliary="auxk")
        y = rows(1).expand(40, -1).contiguous()
        output = sae.training_output(batch_at_scale(sae, y), state_of(torch.arange(D_SAE) > 9))
        output.loss.backward()
        # nothing is left to predict that differs from row to row
        assert float(output.terms.get("auxk", 0.0)) == 0
        assert output.loss.isfinite()
        for name, value in sae.named_parameters():
            assert value.grad is None or value.grad.isfinite().all(), name

    @pytest.mark.parametrize("number", [1, 3])
    def test_a_first_batch_of_one_row_starts_an_sae_or_is_refused(
        self, kind: str, number: int
    ) -> None:
        sae, before = make(kind).train(), make(kind).state_dict()
        first = batch_at_scale(sae, rows(1).expand(number, -1).contiguous())
        if kind == "archetypal":
            with pytest.raises(InputError, match=rf"all equal \(given: 'archetypal, {number} rows"):
                sae.start(first)
            for name, value in before.items():
                assert torch.equal(sae.state_dict()[name], value), name
            return
        sae.start(first)
        torch.testing.assert_close(sae.b_dec.detach(), first.target[0])
        output = sae.training_output(
            batch_at_scale(sae, rows()), state_of(torch.zeros(D_SAE, dtype=torch.bool))
        )
        output.loss.backward()
        assert output.loss.isfinite()
        name = "decoders.0" if kind == "cross_layer_transcoder" else "W_dec"
        assert sae.get_parameter(name).grad.any()  # type: ignore[union-attr]

    @pytest.mark.parametrize("k_aux", [3, 8])
    def test_auxk_is_of_the_hidden_coordinates_alone(self, kind: str, k_aux: int) -> None:
        """The residual is 0 at visible coordinates; a prediction there is neither good nor bad."""
        sae = make(kind)
        if sae.transcodes or not isinstance(sae, AuxKSAE):
            pytest.skip("no AuxK, or nothing to hide")
        sae = with_options(sae, k_aux=k_aux, auxk_coefficient=1.0, auxiliary="auxk").double()
        assert isinstance(sae, AuxKSAE)
        visible = torch.tensor([True, True, True, False, True, False])
        torch.manual_seed(5)
        y, y_hat = torch.randn(2, 30, 6, dtype=torch.float64)
        batch = TrainingBatch.of(y, visible=visible)
        found, dead = Reconstruction.of(y_hat, batch), torch.arange(D_SAE) < 6
        centred = sae.centred(batch)
        loss = sae.add_auxk(y.new_zeros(()), {}, centred, found, state_of(dead))
        with torch.no_grad():
            encoder, decoder = sae.W_enc_T[dead], sae.W_dec[dead]
            if kind == "matching_pursuit":  # <r, d / |d|> / |d|, with d and r where they are seen
                length = (decoder * visible).norm(dim=1, keepdim=True)
                encoder, decoder = encoder / length, decoder / length
            pre = centred @ encoder.T + sae.b_enc[dead]
            size = pre.abs() if sae.signed_auxk else pre
            number = min(k_aux, int(dead.sum()))
            taken = torch.zeros_like(pre).scatter(1, size.topk(number).indices, 1.0)
            e_hat = (pre if sae.signed_auxk else pre.relu()) * taken @ decoder
            e = y - y_hat
            left, total = (e - e_hat).square(), (e - e.mean(0)).square()
        torch.testing.assert_close(
            loss.detach(), left[:, ~visible].sum() / total[:, ~visible].sum()
        )


@pytest.mark.parametrize("kind", ["topk", "matching_pursuit", "mutual_choice"])
def test_a_dead_feature_that_writes_what_is_hidden_predicts_all_of_it(kind: str) -> None:
    """Rows along (1, 0, 0, 2), the last coordinate hidden; the feature writes (1, 0, 0, 2)."""
    sae = make(kind)
    assert isinstance(sae, AuxKSAE)
    y = torch.zeros(30, 6)
    y[:, [0, 3]] = torch.linspace(1, 3, 30)[:, None] * torch.tensor([1.0, 2.0])
    with torch.no_grad():
        sae.W_dec.zero_()[0, [0, 3]] = torch.tensor([1.0, 2.0])
        if kind == "matching_pursuit":
            sae.W_dec.div_(5**0.5)
        else:
            sae.W_enc_T.zero_()[0, 0] = 1.0
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    chosen = torch.arange(D_SAE) == 0
    batch = TrainingBatch.of(y, visible=torch.tensor([True, True, True, False, True, True]))
    found, centred = Reconstruction.of(torch.zeros_like(y), batch), sae.centred(batch)
    if isinstance(sae, BatchSelectionSAE):
        none = SparseCodes.none(y, D_SAE)
        term = sae._aux_zipf(found, centred, none, chosen)
    else:
        term = sae.add_auxk(y.new_zeros(()), {}, centred, found, state_of(chosen))
    assert float(term.detach()) == pytest.approx(0, abs=1e-6)
