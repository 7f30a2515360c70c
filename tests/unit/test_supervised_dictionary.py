"""Supervised dictionary learning: what it lowers is the objective as it is written."""

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from sae.analysis.supervised import Fitted, Form, Problem, blocks, projected
from sae.papers.supervised_dictionary import draw


def problem(rank: int = 3) -> Problem:
    data = draw(30, seed=0, part=0)
    x = data.x / 6
    return Problem(x=x, covariates=data.covariates, y=data.y, rank=rank, xi=0.4, nu=0.3)


def written(
    given: Problem, form: Form, W: Tensor, H: Tensor, beta: Tensor, gamma: Tensor
) -> Tensor:
    """The objective as the module's first lines have it, by a loop over rows."""
    total = given.xi * (given.x - W @ H).square().sum()
    A = beta @ W.T if form == "filter" else beta @ H
    total = total + given.nu / 2 * (A.square().sum() + gamma.square().sum())
    for i in range(len(given.y)):
        code = W.T @ given.x[:, i] if form == "filter" else H[:, i]
        a = beta @ code + gamma @ given.covariates[:, i]
        total = total + torch.log1p(a.exp()) - given.y[i] * a
    return total


def best_codes(given: Problem, form: Form, fitted: Fitted) -> Tensor:
    """The codes H that lower the objective most, all else as it is."""
    H = torch.linalg.lstsq(fitted.W, given.x).solution.requires_grad_()
    if form == "filter":  # the labels do not reach the codes
        return H.detach()
    optimiser = torch.optim.LBFGS([H], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = written(given, form, fitted.W, H, fitted.beta, fitted.gamma)
        loss.backward()
        return loss

    optimiser.step(closure)
    return H.detach()


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("method", ["projected", "blocks"])
def test_a_stationary_point_of_the_written_objective_is_reached(method: str, form: Form) -> None:
    given = problem()
    if method == "projected":
        fitted = projected(given, form, iterations=1000)
    else:
        fitted = blocks(given, form, iterations=1000, seed=0)
    losses = fitted.losses
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(losses))
    H = best_codes(given, form, fitted)
    found = [each.clone().requires_grad_() for each in (fitted.W, H, fitted.beta, fitted.gamma)]
    loss = written(given, form, *found)
    assert float(loss.detach()) == pytest.approx(losses[-1], rel=1e-3)
    moved = [(1.1 * each.detach()).requires_grad_() for each in found]
    steep = torch.autograd.grad(written(given, form, *moved), moved)
    for slope, other in zip(torch.autograd.grad(loss, found), steep, strict=True):
        assert float(slope.norm()) < 0.03 * float(other.norm())


@pytest.mark.parametrize("form", get_args(Form))
def test_both_methods_reach_the_same_objective(form: Form) -> None:
    given = problem()
    one = projected(given, form, iterations=1000)
    other = blocks(given, form, iterations=1000, seed=1)
    assert one.losses[-1] == pytest.approx(other.losses[-1], rel=0.01)


def test_covariates_count_as_the_labels_were_drawn() -> None:
    data = draw(600, seed=0, part=0)
    given = Problem(x=data.x / 12, covariates=data.covariates, y=data.y, rank=3, xi=0.3, nu=0.1)
    first, second = projected(given, "filter", iterations=100).gamma.tolist()
    assert first > 0.2 > -0.2 > second


def test_codes_of_new_rows_need_no_label() -> None:
    given = problem()
    fitted = projected(given, "feature", iterations=50)
    x, covariates = given.x[:, :5], given.covariates[:, :5]
    codes = torch.linalg.lstsq(fitted.W, x).solution
    expected = fitted.beta @ codes + fitted.gamma @ covariates
    assert torch.allclose(fitted.logits(x, covariates), expected)
    left = x - fitted.W @ codes
    assert fitted.missing(x) == pytest.approx(float(left.square().sum() / x.square().sum()))
