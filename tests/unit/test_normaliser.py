"""Every kind of normaliser: what it promises of the data, its inverse, its refusals."""

import pytest
import torch

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.normaliser import Normaliser
from saescope.errors import InputError

X = 5 * torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) + 3


def fit(kind: str, x: torch.Tensor = X) -> Normaliser:
    return Normaliser.fit(
        kind,  # type: ignore[arg-type]
        mean=x.double().mean(0),
        mean_square=float(x.double().square().sum(1).mean()),
        sample=x,
    )


@pytest.mark.parametrize("kind", ["none", "unit_mean_square", "sqrt_d", "centred", "standardised"])
def test_inverse_and_variance(kind: str) -> None:
    normaliser = fit(kind)
    y = normaliser.apply(X)
    torch.testing.assert_close(normaliser.invert(y, like=X), X, rtol=1e-4, atol=1e-4)
    spread = float((y - y.mean(0)).double().square().sum(1).mean())
    assert normaliser.variance == pytest.approx(spread, rel=1e-3)
    # what a normaliser calls the model's units is consistent: y row_scale has x's scale
    assert torch.as_tensor(normaliser.row_scale(X)).ndim in (0, 2)


def test_what_each_kind_promises() -> None:
    assert float(fit("unit_mean_square").apply(X).square().sum(1).mean()) == pytest.approx(1)
    assert float(fit("sqrt_d").apply(X).norm(dim=1).mean()) == pytest.approx(6**0.5, rel=1e-5)
    centred = fit("centred").apply(X)
    assert float(centred.mean(0).norm()) < 1e-5
    assert float(centred.square().sum(1).mean()) == pytest.approx(1, rel=1e-5)
    each = fit("standardised").apply(X)
    torch.testing.assert_close(each.mean(1), torch.zeros(len(X)), rtol=0, atol=1e-5)
    torch.testing.assert_close(each.std(1, correction=0), torch.ones(len(X)), rtol=1e-3, atol=0)


def test_sites_side_by_side_keep_their_scales() -> None:
    both = Normaliser.side_by_side([fit("centred", X[:, :2]), fit("centred", 100 * X[:, 2:])])
    y = both.apply(torch.cat([X[:, :2], 100 * X[:, 2:]], 1))
    for part in (y[:, :2], y[:, 2:]):
        assert float(part.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)
    with pytest.raises(InputError, match="side by side"):
        Normaliser.side_by_side([fit("centred"), fit("none")])


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"no such normaliser.*unit_mean_square"):
        fit("unit")
    with pytest.raises(InputError, match="do not vary"):
        fit("none", torch.ones(5, 6))
    with pytest.raises(InputError, match="needs a sample"):
        Normaliser.fit("standardised", mean=X.mean(0), mean_square=900.0)
    with pytest.raises(InputError, match=r"decode\(codes, like=x\)"):
        fit("standardised").invert(X)


def test_standardised_features_need_the_row_they_came_from() -> None:
    sae = TopKSAE(TopKConfig(d_sae=12, k=3), 6)
    sae.normaliser = fit("standardised")
    codes = sae.encode_sparse(X[:9])
    with pytest.raises(InputError, match=r"like=x"):
        sae.decode(codes)
    torch.testing.assert_close(sae.decode(codes, like=X[:9]), sae(X[:9]).x_hat)
    # invariant to a shift and a scale of the vector, which come back in x_hat
    torch.testing.assert_close(
        sae(2 * X[:9] + 7).x_hat, 2 * sae(X[:9]).x_hat + 7, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["none", "unit_mean_square", "sqrt_d", "centred", "standardised"])
def test_rows_that_are_equal_but_for_rounding_do_not_vary(kind: str) -> None:
    """Moments in float64 of equal rows differ from no variance by rounding, either way."""
    torch.manual_seed(0)
    for rows in (torch.full((1000, 7), 0.1), (torch.randn(7) * 30).repeat(1000, 1)):
        for x in (rows, rows * (1 + 1e-7 * torch.randn(1000, 7))):
            with pytest.raises(InputError, match="do not vary, but for rounding"):
                fit(kind, x)
            fit(kind, x + 1e-3 * x * torch.randn(1000, 7))  # little, but it varies


def test_rows_that_standardise_to_the_same_do_not_vary() -> None:
    x = 1e3 * torch.linspace(1, 9, 50)[:, None] * torch.tensor([[1.0, -1.0, 2.0]])
    fit("centred", x)
    with pytest.raises(InputError, match="do not vary"):
        fit("standardised", x)
