"""BatchTopK, Mutual Choice and aux_zipf against hand-made numbers and dense float64 formulae."""

from dataclasses import replace

import pytest
import torch

from sae.architectures._batch_selection import BatchSelectionSAE
from sae.architectures._thresholds import running_mean_, threshold_for_l0
from sae.architectures._zipf import fit_zipf, zipf_densities
from sae.architectures.batchtopk import BatchTopKConfig, BatchTopKSAE
from sae.architectures.mutual_choice import MutualChoiceConfig, MutualChoiceSAE
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.evaluation.planted import PlantedConfig, PlantedDictionary
from saescope.errors import InputError

X = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])
"""less b_dec: (2,1), (0,1), (-1,-4); pre-activations (2, 1.5, -3), (0, 1.5, -1), (-1, -3.5, 5)"""


def by_hand(k: float = 4 / 3, **options) -> BatchTopKSAE:
    """d_in 2, d_sae 3, with weights that can be multiplied in the head."""
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=3, k=k, **options), 2)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def state_of(sae: BatchSelectionSAE, **more) -> TrainingState:
    return TrainingState(**{"dead": torch.zeros(sae.d_sae, dtype=torch.bool), **more})


def randomised(sae: BatchSelectionSAE, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)


def trained(kind: type[BatchSelectionSAE], config, data: PlantedDictionary, steps: int = 150):
    torch.manual_seed(0)
    sae = kind(config, data.config.d_in).train()
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(steps):
        batch = TrainingBatch.of(data.sample(256, stream=10 + step).x)
        if step == 0:
            sae.start(batch)
        state = state_of(sae, step=step, total_steps=steps)
        optimiser.zero_grad()
        sae.training_output(batch, state).loss.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step()
    return sae.eval()


# ---- by hand --------------------------------------------------------------------------------


def test_budget_is_shared_by_the_batch_by_hand() -> None:
    """Four activations over three rows: 5, 2 and both 1.5; the first row has two of them."""
    sae = by_hand()
    output = sae.training_output(TrainingBatch.of(X), state_of(sae))
    assert output.counts.tolist() == [1, 2, 1]
    torch.testing.assert_close(output.y_hat, torch.tensor([[3.0, 1.5], [1.0, 1.5], [-2.0, -4.0]]))
    # errors (0,-0.5), (0,-0.5), (2,0): squares 0.25, 0.25, 4
    assert float(output.loss.detach()) == pytest.approx(1.5)
    assert float(output.l0) == pytest.approx(4 / 3)


def test_inference_is_by_the_threshold_by_hand() -> None:
    sae = by_hand()
    # untrained: all that is positive fires
    assert sae.encode(X).tolist() == [[2, 1.5, 0], [0, 1.5, 0], [0, 0, 5]]
    sae.training_output(TrainingBatch.of(X), state_of(sae))
    assert float(sae.threshold) == 1.5  # the smallest selected; not 0.015 (SAELens starts from 0)
    assert sae.encode(X).tolist() == [[2, 0, 0], [0, 0, 0], [0, 0, 5]]
    # a row alone has the same code as among others
    assert torch.equal(sae.encode(X[:1]), sae.encode(X)[:1])


def test_auxk_by_hand() -> None:
    sae = by_hand(k=1)
    # the budget is 3: 5, 2 and the first of the two 1.5
    dead = torch.tensor([False, True, False])
    output = sae.training_output(TrainingBatch.of(X), state_of(sae, dead=dead))
    error = X - output.y_hat.detach()
    e_hat = torch.tensor([[0, 1.5], [0, 1.5], [0, 0]])
    aux = (error - e_hat).square().sum() / (error - error.mean(0)).square().sum()
    torch.testing.assert_close(output.terms["auxk"], aux)
    torch.testing.assert_close(output.loss, output.terms["fvu"] + aux / 32)


# ---- gradients ------------------------------------------------------------------------------


def dense_objective(sae: BatchSelectionSAE, y: torch.Tensor, n: int) -> torch.Tensor:
    """FVU of the n largest of the batch, dense, without the kernels."""
    pre = (y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc
    bar = pre.detach().flatten().sort(descending=True).values[n - 1]
    y_hat = pre * ((pre >= bar) & (pre > 0)) @ sae.W_dec + sae.b_dec
    return (y - y_hat).square().sum(1).mean()


def dense_aux_zipf(sae: BatchSelectionSAE, y: torch.Tensor, n: int, n_aux: int) -> torch.Tensor:
    """AuxK's ratio over under-used features, without what the code has already."""
    pre = (y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc
    bar = pre.detach().flatten().sort(descending=True).values[n - 1]
    code = (pre >= bar) & (pre > 0)
    error = (y - pre * code @ sae.W_dec - sae.b_dec).detach()
    free = pre * (sae.underused & ~code)
    bar = free.detach().flatten().sort(descending=True).values[n_aux - 1]
    e_hat = free * ((free >= bar) & (free > 0)) @ sae.W_dec
    return (error - e_hat).square().sum() / (error - error.mean(0)).square().sum()


@pytest.mark.parametrize("k_aux", [1, 3, 40])
@pytest.mark.parametrize("auxiliary", ["auxk", "zipf"])
def test_gradients_equal_the_dense_float64_objective(auxiliary: str, k_aux: int) -> None:
    config = BatchTopKConfig(d_sae=40, k=4.5, k_aux=k_aux, auxiliary=auxiliary)  # type: ignore[arg-type]
    sae = BatchTopKSAE(config, 7).double()
    randomised(sae)
    sae.underused[:15] = True
    y = torch.randn(30, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = sae.training_output(TrainingBatch.of(y), state_of(sae))
    output.loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    expected = dense_objective(sae, y, 135)
    if auxiliary == "zipf":
        expected = expected + dense_aux_zipf(sae, y, 135, min(30 * k_aux, 30 * 40)) / 32
        assert float(output.terms["aux_zipf"]) > 0
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


def test_hidden_coordinates_neither_encode_nor_escape_the_loss() -> None:
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=16, k=2, auxiliary="zipf"), 6)
    randomised(sae)
    sae.underused[:5] = True
    visible = torch.tensor([True, True, True, False, False, True])
    y = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    output = sae.training_output(TrainingBatch.of(y, visible=visible), state_of(sae))
    other = y + torch.where(visible, 0.0, 5.0)
    moved = sae.training_output(TrainingBatch.of(other, visible=visible), state_of(sae))
    assert torch.equal(output.y_hat, moved.y_hat)
    share = (y - output.y_hat)[:, ~visible].square().sum(1).mean() / (2 / 6)
    torch.testing.assert_close(output.terms["fvu"], share.detach())


# ---- the budget -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.3, 1, 2.5, 7])
@pytest.mark.parametrize("shift", [-3.0, -1.0, 0.0, 2.0])
@pytest.mark.parametrize("ties", [False, True])
def test_budget_is_kept_exactly(k: float, shift: float, ties: bool) -> None:
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=24, k=k), 5)
    randomised(sae)
    with torch.no_grad():
        sae.b_enc.fill_(shift)
        if ties:  # whole numbers: many equal pre-activations
            for parameter in sae.parameters():
                parameter.round_()
    y = torch.randn(33, 5, generator=torch.Generator().manual_seed(2))
    y = y.round() if ties else y
    pre = (y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc
    output = sae.training_output(TrainingBatch.of(y), state_of(sae))
    assert int(output.counts.sum()) == min(round(33 * k), int((pre > 0).sum()))


def test_defect_11_budget_is_k_for_each_row_not_for_the_batch() -> None:
    """overcomplete's BatchTopK keeps top_k a batch: 8 over 32 rows is a mean L0 of 0.25."""
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=64, k=8), 16)
    y = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    assert float(sae.training_output(TrainingBatch.of(y), state_of(sae)).l0) == 8


def test_nothing_positive_selects_nothing() -> None:
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=8, k=2), 3)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    output = sae.training_output(TrainingBatch.of(torch.randn(5, 3)), state_of(sae))
    output.loss.backward()
    assert output.counts.tolist() == [0] * 8
    assert output.loss.isfinite()
    assert float(sae.threshold) == 0
    assert int(sae.threshold_updates) == 0


# ---- running state --------------------------------------------------------------------------


def test_defect_11_threshold_is_in_the_state_dict() -> None:
    """overcomplete's running_threshold is lost on saving."""
    sae = by_hand()
    sae.training_output(TrainingBatch.of(X), state_of(sae))
    again = by_hand()
    again.load_state_dict(sae.state_dict())
    assert float(again.threshold) == 1.5
    for name in ("threshold_updates", "density", "density_updates", "underused"):
        assert torch.equal(getattr(again, name), getattr(sae, name)), name


def test_defect_8_state_moves_once_a_training_step_and_never_in_evaluation() -> None:
    """dictionary_learning's logging advances its threshold and counters a second time."""
    sae = by_hand()
    sae.eval().training_output(TrainingBatch.of(X), state_of(sae))
    sae(X)
    assert int(sae.threshold_updates) == int(sae.density_updates) == 0
    assert float(sae.threshold) == 0
    sae.train().training_output(TrainingBatch.of(X), state_of(sae))
    assert int(sae.threshold_updates) == int(sae.density_updates) == 1
    torch.testing.assert_close(sae.density, torch.tensor([1.0, 2.0, 1.0]) / 3)


def test_running_mean_is_the_weighted_mean_of_what_it_saw() -> None:
    values = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    mean, updates = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    for value in values:
        running_mean_(mean, value, updates, 0.9)
    weight = 0.9 ** torch.arange(19, -1, -1.0)[:, None]
    torch.testing.assert_close(mean, (weight * values).sum(0) / weight.sum())
    running_mean_(mean, values[0], updates, 0.0)
    torch.testing.assert_close(mean, values[0])


def test_threshold_stays_float32_in_a_bfloat16_module() -> None:
    sae = by_hand()
    sae.threshold.fill_(1.2345678)
    low = sae.to(torch.bfloat16)
    assert low.W_dec.dtype == torch.bfloat16
    assert low.threshold.dtype == low.density.dtype == torch.float32
    assert float(low.threshold) == pytest.approx(1.2345678, rel=1e-7)
    # 1.5 is a bfloat16; a threshold just below it is not, and would be rounded up to it
    low.threshold.fill_(1.4999)
    assert low.encode(X.bfloat16())[1].tolist() == [0, 1.5, 0]


# ---- calibration ----------------------------------------------------------------------------


def scored(scores: torch.Tensor, rows: int):
    """Chunks of a score matrix, as `threshold_for_l0` takes them."""
    for part in scores.split(rows):
        positive = part[part > 0].sort(descending=True).values
        yield len(part), lambda n, positive=positive: positive[:n]


@pytest.mark.parametrize("k", [0.2, 1.0, 3.7, 11.0])
def test_threshold_for_l0_is_an_exact_order_statistic(k: float) -> None:
    scores = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) + 2
    threshold = threshold_for_l0(lambda: scored(scores, 77), k)
    wanted = min(round(500 * k), int((scores > 0).sum()))
    assert int((scores > threshold).sum()) == wanted


def test_threshold_for_l0_with_chunks_that_differ() -> None:
    """All that fires is in one chunk of ten: more of it is needed than a pass keeps."""
    scores = torch.zeros(1000, 20)
    scores[:100] = torch.rand(100, 20, generator=torch.Generator().manual_seed(0)) + 0.1
    passes = []

    def chunks():
        passes.append(1)
        return scored(scores, 100)

    threshold = threshold_for_l0(chunks, 1.0)
    assert int((scores > threshold).sum()) == 1000
    assert len(passes) > 1
    assert threshold_for_l0(chunks, 3.0) == 0.0  # fewer are positive
    with pytest.raises(InputError, match="no rows to calibrate on"):
        threshold_for_l0(lambda: iter([]), 1.0)


@pytest.mark.parametrize("k", [2.0, 4.5])
def test_calibrated_l0_holds_on_other_rows(k: float) -> None:
    data = PlantedDictionary(PlantedConfig(features=48, d_in=24, active=3))
    sae = trained(BatchTopKSAE, BatchTopKConfig(d_sae=64, k=k), data)
    rows = data.sample(4000, stream=1).x
    learnt = float(sae.encode_sparse(data.sample(4000, stream=2).x).l0().float().mean())
    assert learnt == pytest.approx(k, rel=0.2)
    sae.calibrate(lambda: iter(rows.split(1500)))
    assert float(sae.encode_sparse(rows).l0().float().mean()) == pytest.approx(k, abs=1e-3)
    other = float(sae.encode_sparse(data.sample(4000, stream=2).x).l0().float().mean())
    assert other == pytest.approx(k, rel=0.05)
    sae = sae.fold()
    assert float(sae.encode_sparse(rows).l0().float().mean()) == pytest.approx(k, abs=1e-3)


# ---- Mutual Choice and aux_zipf -------------------------------------------------------------


def test_mutual_choice_is_batchtopk_to_the_bit() -> None:
    data = PlantedDictionary(PlantedConfig(features=16, d_in=8, active=2))
    one = trained(BatchTopKSAE, BatchTopKConfig(d_sae=24, k=2), data, steps=8)
    config = MutualChoiceConfig(d_sae=24, k=2, auxiliary="auxk")
    two = trained(MutualChoiceSAE, config, data, steps=8)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert MutualChoiceConfig().auxiliary == "zipf"


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.5, 0.0), (1.0, 0.0), (1.0, 2.7), (1.7, 30.0), (0.0, 0.0), (3.0, 200.0)]
)
def test_fit_of_an_exact_zipf_law(alpha: float, beta: float) -> None:
    ranks = torch.arange(1, 1001, dtype=torch.float64)
    law = 0.3 * (ranks + beta) ** -alpha
    shuffled = law[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    found = fit_zipf(shuffled)
    assert found[0] == pytest.approx(alpha, abs=1e-3)
    if alpha:
        assert found[1] == pytest.approx(beta, rel=1e-3, abs=1e-3)
    assert fit_zipf(shuffled) == found
    torch.testing.assert_close(zipf_densities(shuffled), shuffled.float(), rtol=1e-4, atol=1e-9)


def test_features_that_hardly_fire_do_not_bend_the_law() -> None:
    law = 0.1 / (torch.arange(1, 101, dtype=torch.float64) + 3)
    for tail in (0.0, 1e-30, 1e-7):
        alpha, beta = fit_zipf(torch.cat([law, torch.full((300,), tail, dtype=torch.float64)]))
        assert alpha == pytest.approx(1, abs=0.02)
        assert beta == pytest.approx(3, abs=0.2)


def test_fit_of_degenerate_densities() -> None:
    assert fit_zipf(torch.tensor([0.25]))[0] == 0
    assert fit_zipf(torch.tensor([0.25, 0.25, 0.0]))[0] == pytest.approx(0, abs=1e-9)
    with pytest.raises(InputError, match="no feature fires"):
        fit_zipf(torch.zeros(4))
    assert zipf_densities(torch.zeros(4)).tolist() == [0.25] * 4


def test_underused_are_those_below_the_law_and_only_once_densities_are_known() -> None:
    sae = MutualChoiceSAE(MutualChoiceConfig(d_sae=32, k=2, ema_decay=0.5, zipf_share=0.5), 6)
    randomised(sae)
    with torch.no_grad():
        sae.b_enc[20:].fill_(-100)  # these cannot fire
    batch = TrainingBatch.of(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)))
    sae.training_output(batch, state_of(sae, step=0))
    assert not sae.underused.any()  # one step is not the running average's memory yet
    sae.training_output(batch, state_of(sae, step=24))
    assert not sae.underused.any()
    output = sae.training_output(batch, state_of(sae, step=25))
    assert sae.underused[20:].all()
    assert torch.equal(sae.underused, sae.density < 0.5 * zipf_densities(sae.density))
    assert "aux_zipf" in output.terms
    assert "auxk" not in output.terms


def test_aux_zipf_revives_features_that_auxk_does_not_call_dead() -> None:
    sae = MutualChoiceSAE(MutualChoiceConfig(d_sae=16, k=2), 6)
    randomised(sae)
    sae.underused[:4] = True
    batch = TrainingBatch.of(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    state = state_of(sae)
    total = sae.training_output(batch, state)
    sae.config = replace(sae.config, auxk_coefficient=0.0)
    plain = sae.training_output(batch, state)
    assert "aux_zipf" not in plain.terms
    difference = (total.loss - plain.loss) * 32
    torch.testing.assert_close(difference, total.terms["aux_zipf"], rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(difference, [sae.W_enc_T, sae.W_dec])
    for gradient in gradients:
        assert gradient[:4].any()
        assert gradient[4:].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0.0}, r"sae.k: out of range \(given: 0.0; allowed: .*above 0"),
        ({"k": 8.5}, "sae.k"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"zipf_share": 0.0}, "zipf_share"),
        ({"auxk_coefficient": -1.0}, "auxk_coefficient"),
    ],
)
def test_ranges(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BatchTopKConfig(**{"d_sae": 8, "k": 2, **values})


def test_a_batch_too_small_for_one_activation_is_refused() -> None:
    with pytest.raises(InputError, match=r"too small .*allowed: more than 0.25"):
        BatchTopKConfig(d_sae=8, k=0.1).budget(2)
    assert BatchTopKConfig(d_sae=8, k=2).with_target_l0(3.5).k == 3.5
