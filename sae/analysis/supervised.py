"""Supervised dictionary learning with covariates (Lee, Lyu and Yao, 2022).

Rows X [p, n] are explained by a dictionary W [p, r] with codes H [r, n], and the same W also tells
labels y in {0, 1}, with covariates X' [q, n] that enter the classifier alone:

    sum_i log(1 + exp(a_i)) - y_i a_i  +  xi ||X - W H||_F^2  +  nu / 2 (||A||^2 + ||gamma||^2)

with a_i = beta^T W^T x_i + gamma^T x'_i (filter form, A = beta^T W^T) or beta^T h_i + gamma^T x'_i
(feature form, A = beta^T H). Both are convex in (A, B = W H, gamma), and A and B together have rank
r: [A^T, B] = W [beta, H], or [A; B] = [beta^T; W] H.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["filter", "feature"]
Method = Literal["projected", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Training data, and what is minimised."""

    x: Tensor
    """[p, n]"""
    covariates: Tensor
    """[q, n]"""
    y: Tensor
    """[n], 0 or 1"""
    rank: int
    xi: float
    nu: float = 1.0

    def loss(self, a: Tensor, b: Tensor, gamma: Tensor, form: Form) -> Tensor:
        """The objective at A [p] (filter) or [n] (feature), B [p, n] and gamma [q]."""
        logits = (a @ self.x if form == "filter" else a) + gamma @ self.covariates
        told = torch.nn.functional.softplus(logits).sum() - self.y @ logits
        ridge = self.nu / 2 * (a.square().sum() + gamma.square().sum())
        return told + self.xi * (self.x - b).square().sum() + ridge


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A dictionary and its classifier."""

    W: Tensor
    """[p, r]"""
    beta: Tensor
    """[r]"""
    gamma: Tensor
    """[q]"""
    form: Form
    losses: tuple[float, ...]
    """the objective after each iteration"""

    def logits(self, x: Tensor, covariates: Tensor) -> Tensor:
        """Of rows [p, n] whose labels nobody knows; the feature form's codes are least squares."""
        codes = self.W.T @ x if self.form == "filter" else torch.linalg.pinv(self.W) @ x
        return self.beta @ codes + self.gamma @ covariates

    def missing(self, x: Tensor) -> float:
        """The share of the rows' sum of squares that the dictionary cannot reconstruct."""
        basis = torch.linalg.qr(self.W).Q
        return float((x - basis @ (basis.T @ x)).square().sum() / x.square().sum())


def projected(problem: Problem, form: Form, *, iterations: int) -> Fitted:
    """Low-rank projected gradient descent (section 3): a step in (A, B, gamma), then rank r again.

    Steps are 1 / L of the convex objective, L the largest curvature of A, B and gamma.
    """
    x, covariates, y = problem.x, problem.covariates, problem.y
    curvature = float(torch.linalg.matrix_norm(covariates, 2)) ** 2 / 4
    seen = float(torch.linalg.matrix_norm(x, 2)) ** 2 / 4 if form == "filter" else 0.25
    step = 1 / (max(seen + curvature, 2 * problem.xi) + problem.nu)
    a = x.new_zeros(len(x) if form == "filter" else len(y))
    b, gamma = torch.zeros_like(x), x.new_zeros(len(covariates))
    losses, W, beta = [], x[:, :0], x.new_zeros(0)
    for _ in range(iterations):
        logits = (a @ x if form == "filter" else a) + gamma @ covariates
        beyond = torch.sigmoid(logits) - y
        toward = x @ beyond if form == "filter" else beyond
        gamma = gamma - step * (covariates @ beyond + problem.nu * gamma)
        a = a - step * (toward + problem.nu * a)
        b = b - step * 2 * problem.xi * (b - x)
        stacked = torch.cat([a[:, None], b], dim=1) if form == "filter" else torch.cat([a[None], b])
        left, values, right = torch.linalg.svd(stacked, full_matrices=False)
        left, right = left[:, : problem.rank], values[: problem.rank, None] * right[: problem.rank]
        low = left @ right
        if form == "filter":
            a, b, W, beta = low[:, 0], low[:, 1:], left, right[:, 0]
        else:
            a, b, W, beta = low[0], low[1:], left[1:], left[0]
        losses.append(float(problem.loss(a, b, gamma, form)))
    return Fitted(W=W, beta=beta, gamma=gamma, form=form, losses=(*losses,))


def blocks(problem: Problem, form: Form, *, iterations: int, seed: int) -> Fitted:
    """Block coordinate descent (section 4): codes, dictionary, classifier in turn.

    The reconstruction's codes are solved for; the other blocks make a gradient step of the length
    that their own curvature allows, which never raises the objective.
    """
    x, covariates, y = problem.x, problem.covariates, problem.y
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(len(x), problem.rank, generator=generator, dtype=x.dtype) / len(x) ** 0.5
    H = torch.linalg.lstsq(W, x).solution
    beta, gamma = x.new_zeros(problem.rank), x.new_zeros(len(covariates))
    losses = []

    def beyond() -> Tensor:
        codes = W.T @ x if form == "filter" else H
        return torch.sigmoid(beta @ codes + gamma @ covariates) - y

    def tilt() -> Tensor:
        """The gradient of nu / 2 ||A||^2 in A."""
        return problem.nu * (beta @ W.T if form == "filter" else beta @ H)

    for _ in range(iterations):
        if form == "filter":
            H = torch.linalg.lstsq(W, x).solution
        else:
            held = 2 * problem.xi * W.T @ W
            curved = float(torch.linalg.matrix_norm(held, 2))
            curved += (0.25 + problem.nu) * float(beta @ beta)
            toward = held @ H - 2 * problem.xi * W.T @ x + beta[:, None] * (beyond() + tilt())
            H = H - toward / curved
        grown = float(torch.linalg.matrix_norm(H, 2)) ** 2 * 2 * problem.xi
        toward = 2 * problem.xi * (W @ H - x) @ H.T
        if form == "filter":
            seen = float(torch.linalg.matrix_norm(x, 2)) ** 2 / 4 + problem.nu
            grown += seen * float(beta @ beta)
            toward = toward + (x @ beyond() + tilt())[:, None] * beta
        W = W - toward / grown
        codes = W.T @ x if form == "filter" else H
        ridge = W.T @ W if form == "filter" else H @ H.T
        curved = float(torch.linalg.matrix_norm(codes, 2)) ** 2 / 4
        curved += problem.nu * float(torch.linalg.matrix_norm(ridge, 2))
        beta = beta - (codes @ beyond() + problem.nu * ridge @ beta) / curved
        curved = float(torch.linalg.matrix_norm(covariates, 2)) ** 2 / 4 + problem.nu
        gamma = gamma - (covariates @ beyond() + problem.nu * gamma) / curved
        a = beta @ (W.T if form == "filter" else H)
        losses.append(float(problem.loss(a, W @ H, gamma, form)))
    return Fitted(W=W, beta=beta, gamma=gamma, form=form, losses=(*losses,))
