"""Straight-through estimators of a threshold, on the entries that can feel it.

A step has no useful derivative. In the mean over a batch it has one, and these pseudo-derivatives
estimate it with a rectangular kernel K(u) = 1 for |u| < 1/2 of width eps, from the entries that lie
within eps/2 of the threshold (Rajamanoharan et al. 2024, "Jumping Ahead", section 4):

    d JumpReLU_theta(z) / d theta := -(theta / eps) K((z - theta) / eps)
    d H(z - theta) / d theta      := -(1 / eps) K((z - theta) / eps)

JumpReLU's derivative in z is the true one, H(z - theta); that of H in z is 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def jump_relu(z: Tensor, theta: Tensor, eps: float) -> Tensor:
    """z where z > theta, else 0; z and theta [entries], theta >= 0, eps in the units of both."""
    return _JumpReLU.apply(z, theta, eps)  # type: ignore[return-value]


def step(z: Tensor, theta: Tensor, eps: float) -> Tensor:
    """1 where z > theta, else 0; z and theta [entries], eps in the units of both."""
    return _Step.apply(z, theta, eps)  # type: ignore[return-value]


def _near(z: Tensor, theta: Tensor, eps: float) -> Tensor:
    return (z - theta).abs() < eps / 2


class _JumpReLU(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return torch.where(z > theta, z, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, theta = ctx.saved_tensors
        (gradient,) = gradients
        d_z = torch.where(z > theta, gradient, 0)
        d_theta = torch.where(_near(z, theta, ctx.eps), gradient * theta / -ctx.eps, 0)
        return d_z, d_theta.to(theta), None


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return (z > theta).to(theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, theta = ctx.saved_tensors
        (gradient,) = gradients
        d_theta = torch.where(_near(z, theta, ctx.eps), gradient / -ctx.eps, 0)
        return None, d_theta, None
