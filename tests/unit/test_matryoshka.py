"""Matryoshka: prefix losses by hand, their weights, gradients, and the SAE of a prefix."""

import pytest
import torch

from sae.architectures._batch_selection import BatchSelectionSAE
from sae.architectures.batchtopk import BatchTopKSAE
from sae.architectures.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.core.losses import auxk
from sae.core.normaliser import Normaliser
from saescope.config import from_dict, to_dict
from saescope.errors import InputError

X = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])
"""less b_dec: (2,1), (0,1), (-1,-4); pre-activations (2, 1.5, -3), (0, 1.5, -1), (-1, -3.5, 5)"""


def by_hand(**options) -> MatryoshkaSAE:
    """d_in 2, d_sae 3, prefixes of 1 and 3 features, weights to multiply in the head."""
    config = MatryoshkaConfig(d_sae=3, k=4 / 3, prefix_widths=(1, 3), **options)
    sae = MatryoshkaSAE(config, 2)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def state_of(sae: BatchSelectionSAE, dead: list[int] | None = None) -> TrainingState:
    mask = torch.zeros(sae.d_sae, dtype=torch.bool)
    mask[dead or []] = True
    return TrainingState(dead=mask)


# kept are 5, 2 and both 1.5; squared errors of the rows, summed:
# no feature: (2,1) (0,1) (-1,-4) -> 5 + 1 + 17 = 23;  feature 0: (0,1) (0,1) (-1,-4) -> 19
# all: (0,-0.5) (0,-0.5) (2,0) -> 4.5
EMPTY, FIRST, ALL = 23 / 3, 19 / 3, 1.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (EMPTY + FIRST + ALL) / 3),
        ({"include_empty": False}, (FIRST + ALL) / 2),
        ({"prefix_weights": (0.0, 3.0, 1.0)}, (3 * FIRST + ALL) / 4),
        ({"include_empty": False, "prefix_weights": (1.0, 4.0)}, (FIRST + 4 * ALL) / 5),
    ],
)
def test_loss_by_hand(options: dict, expected: float) -> None:
    output = by_hand(**options).training_output(TrainingBatch.of(X), state_of(by_hand()))
    assert output.counts.tolist() == [1, 2, 1]
    assert float(output.loss.detach()) == pytest.approx(expected)
    assert float(output.terms["nested"]) == pytest.approx(expected)
    assert float(output.terms["fvu"]) == pytest.approx(ALL)
    torch.testing.assert_close(output.y_hat, torch.tensor([[3.0, 1.5], [1.0, 1.5], [-2.0, -4.0]]))


def test_defect_prefix_losses_are_averaged_once() -> None:
    """dictionary_learning weights each level by 1/n and takes the mean: 1/n^2.

    AuxK then weighs n times what it does elsewhere. With as many equal levels as one likes, the
    loss stays that of BatchTopK.
    """
    for widths in ((8,), (2, 8), (1, 2, 3, 4, 8)):
        config = MatryoshkaConfig(d_sae=8, k=2, prefix_widths=widths)
        assert sum(config.weights()) == pytest.approx(1)
        sae = MatryoshkaSAE(config, 4)
        with torch.no_grad():
            sae.b_enc.fill_(-100)  # nothing fires: every prefix costs the same
        batch = TrainingBatch.of(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
        output = sae.training_output(batch, state_of(sae))
        torch.testing.assert_close(output.loss.detach(), output.terms["fvu"])


def dense_objective(sae: MatryoshkaSAE, y: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """The paper's objective, dense, every prefix multiplied out."""
    config = sae.config
    centred = y - sae.b_dec
    pre = centred @ sae.W_enc_T.T + sae.b_enc
    bar = pre.detach().flatten().sort(descending=True).values[round(config.k * len(y)) - 1]
    f = pre * ((pre >= bar) & (pre > 0))
    own = config.weights()[-len(config.widths()) :]
    loss = torch.zeros((), dtype=y.dtype)
    if config.include_empty:
        loss = config.weights()[0] * centred.square().sum(1).mean()
    for width, weight in zip(config.widths(), own, strict=True):
        error = y - (f[:, :width] @ sae.W_dec[:width] + sae.b_dec)
        loss = loss + weight * error.square().sum(1).mean()
        share = weight / sum(own) if config.aux_per_level else float(width == config.d_sae)
        if share:
            inside = dead & (torch.arange(config.d_sae) < width)
            aux = auxk(error, centred, sae.W_enc_T, sae.b_enc, sae.W_dec, inside, config.k_aux or 1)
            loss = loss + share * aux / 32
    return loss


@pytest.mark.parametrize("aux_per_level", [False, True])
@pytest.mark.parametrize("include_empty", [False, True])
def test_gradients_equal_the_dense_float64_objective(
    include_empty: bool, aux_per_level: bool
) -> None:
    torch.manual_seed(0)
    config = MatryoshkaConfig(
        d_sae=32, k=3, k_aux=2, include_empty=include_empty, aux_per_level=aux_per_level
    )
    sae = MatryoshkaSAE(config, 6).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    y = torch.randn(25, 6, dtype=torch.float64)
    state = state_of(sae, dead=[1, 3, 10, 11, 20, 25, 31])
    output = sae.training_output(TrainingBatch.of(y), state)
    output.loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    expected = dense_objective(sae, y, state.dead)
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


def test_zipf_auxiliary_per_level_stays_within_its_prefix() -> None:
    config = MatryoshkaConfig(
        d_sae=16, k=2, auxiliary="zipf", aux_per_level=True, prefix_widths=(4, 16)
    )
    sae = MatryoshkaSAE(config, 6)
    sae.underused[8:12] = True
    batch = TrainingBatch.of(torch.randn(30, 6, generator=torch.Generator().manual_seed(0)))
    output = sae.training_output(batch, state_of(sae))
    assert float(output.terms["aux_zipf"]) > 0  # from the second level alone
    difference = output.loss - output.terms["nested"]
    torch.testing.assert_close(difference.detach(), output.terms["aux_zipf"] / 32)


@pytest.mark.parametrize(
    ("d_sae", "widths"),
    [
        (36864, [2304, 4608, 9216, 18432, 36864]),
        (64, [4, 8, 16, 32, 64]),
        (20, [1, 2, 5, 10, 20]),
        (3, [1, 2, 3]),
        (1, [1]),
    ],
)
def test_widths_of_the_papers_groups(d_sae: int, widths: list[int]) -> None:
    assert MatryoshkaConfig(d_sae=d_sae, k=1).widths() == widths


def test_configuration_round_trip() -> None:
    config = MatryoshkaConfig(d_sae=8, k=2.5, prefix_widths=(2, 8), prefix_weights=(1, 2, 3))
    assert from_dict(MatryoshkaConfig, to_dict(config), "test") == config


def small(normaliser: str = "none") -> tuple[MatryoshkaSAE, torch.Tensor]:
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaConfig(d_sae=32, k=3), 6)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    x = 4 * torch.randn(200, 6) + 1
    sae.normaliser = Normaliser.fit(
        normaliser,  # type: ignore[arg-type]
        mean=x.mean(0),
        mean_square=float(x.square().sum(1).mean()),
    )
    sae.metadata = {"site": "blocks.0.hook_resid_post"}
    sae.eval().calibrate(lambda: iter([sae.normaliser.apply(x)]))
    return sae, x


@pytest.mark.parametrize("normaliser", ["none", "centred"])
def test_the_sae_of_a_prefix_has_the_wholes_first_features(normaliser: str) -> None:
    sae, x = small(normaliser)
    whole = sae.encode(x)
    assert sae.levels == 5
    for level, width in enumerate(sae.config.widths()):
        prefix = sae.prefix(level)
        assert isinstance(prefix, BatchTopKSAE)
        assert prefix.d_sae == width
        torch.testing.assert_close(prefix.encode(x), whole[:, :width])
        only = whole * (torch.arange(32) < width)
        torch.testing.assert_close(prefix(x).x_hat, sae.decode(only), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(prefix.fold()(x).x_hat, prefix(x).x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.prefix(4)(x).x_hat, sae(x).x_hat)
    assert float(sae.prefix(4).encode_sparse(x).l0().float().mean()) == pytest.approx(3, abs=0.01)
    with torch.no_grad():
        prefix = sae.prefix(0)
        prefix.W_dec.zero_()
    assert sae.W_dec[:2].any()  # a copy
    with pytest.raises(InputError, match=r"no such level \(given: 5; allowed: 0 to 4\)"):
        sae.prefix(5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_fractions": (0.5, 0.4)}, "must sum to 1"),
        ({"group_fractions": (1.5, -0.5)}, "group_fractions"),
        ({"prefix_widths": (4, 2, 8)}, "allowed: increasing, the last 8"),
        ({"prefix_widths": (2, 4)}, "prefix_widths"),
        ({"prefix_widths": (0, 8)}, "prefix_widths"),
        ({"prefix_widths": (2, 8), "prefix_weights": (1.0, 1.0)}, "allowed: 3 numbers"),
        ({"prefix_widths": (2, 8), "prefix_weights": (1.0, -1.0, 1.0)}, "prefix_weights"),
        ({"prefix_widths": (2, 8), "prefix_weights": (0.0, 0.0, 0.0)}, "prefix_weights"),
    ],
)
def test_ranges(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MatryoshkaConfig(**{"d_sae": 8, "k": 2, **values})
