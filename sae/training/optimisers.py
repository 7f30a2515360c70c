"""Optimisers: Adam, signum and their schedule-free forms; their state is tensors, for exact resume.

Schedule-free (Defazio et al. 2024, section 2) keeps three points for every parameter:

    y_t     = (1 - beta) z_t + beta x_t     where gradients are taken; the parameter itself
    z_{t+1} = z_t - lr d(y_t)               d: what the base optimiser makes of the gradient
    x_{t+1} = (1 - c) x_t + c z_{t+1}       c = lr_t^2 / sum_{i<=t} lr_i^2; what is to be released

Constraints. A trainer changes parameters between steps: decoder rows are put back to unit norm.
That moves y only, so a step first moves z and x by whatever y was moved by, and the three stay in
their relation. z is thereby held near the constraint too (else the norm of its rows would grow
without end, and the effective learning rate fall); the average of unit rows is a little shorter
than 1, and `averaged` takes the constraint to be put on it while it is used.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sae.core.base import SparseAutoencoder
from sae.kernels import adam as fused
from saescope.errors import InputError, check_range

OptimiserKind = Literal["adam", "signum", "schedule_free_adam", "schedule_free_signum"]

_POINTS = ("z", "x")
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")
_SHARED = ("b_dec", "W_skip")
"""Parameters that have no row a feature, whatever their shape."""


def make_optimiser(
    kind: OptimiserKind,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 6.25e-10,
    momentum: float = 0.95,
    unit_rows: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """An optimiser by its name.

    Args: beta1, beta2 and eps are Adam's; schedule-free Adam has beta1 for its interpolation.
    momentum is signum's, and the interpolation of schedule-free signum, which needs no other.
    unit_rows are those of the parameters whose rows Adam holds at unit norm; the others do not.

    Raises InputError for an unknown name or a value out of range.
    """
    check_range("optimiser.lr", lr, above=0)
    for name, value in (("beta1", beta1), ("beta2", beta2), ("momentum", momentum)):
        check_range(f"optimiser.{name}", value, low=0, below=1)
    check_range("optimiser.eps", eps, above=0)
    if kind == "adam":
        return Adam(parameters, lr=lr, beta1=beta1, beta2=beta2, eps=eps, unit_rows=unit_rows)
    if kind == "signum":
        return Signum(parameters, lr=lr, momentum=momentum)
    if kind == "schedule_free_adam":
        return ScheduleFreeAdam(parameters, lr=lr, beta=beta1, beta2=beta2, eps=eps)
    if kind == "schedule_free_signum":
        return ScheduleFreeSignum(parameters, lr=lr, beta=momentum)
    raise InputError(
        "no such optimiser", where="optimiser", given=kind, allowed=get_args(OptimiserKind)
    )


def decays(kind: OptimiserKind) -> bool:
    """Whether the learning rate should fall at the end; schedule-free kinds average instead."""
    return not kind.startswith("schedule_free")


class Adam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) in one pass over each parameter, which may hold rows at unit norm.

    Of the gradient of such `unit_rows` only what is orthogonal to the rows counts, in
    `gradient_squares` as in `step`, and a step puts the rows back to unit norm. Gradients are left
    as they are. The state is that of torch's Adam: exp_avg, exp_avg_sq, step.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 6.25e-10,
        unit_rows: Iterable[nn.Parameter] = (),
    ) -> None:
        super().__init__(parameters, {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps})
        self.unit_rows = frozenset(unit_rows)

    @torch.no_grad()
    def gradient_squares(self) -> dict[nn.Parameter, Tensor]:
        """Squared norm of each parameter's gradient, float64 []; of those that have one."""
        return {
            parameter: fused.gradient_square(parameter, gradient, parameter in self.unit_rows)
            for _, parameter, gradient in _with_gradient(self)
        }

    @torch.no_grad()
    def step(self, closure: None = None, *, scale: float = 1.0) -> None:  # type: ignore[override]
        """One step on the gradient times `scale`; parameters without one stay where they are."""
        del closure
        for group, parameter, gradient in _with_gradient(self):
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter)
            state["step"] += 1
            fused.adam_(
                parameter,
                gradient,
                state["exp_avg"],
                state["exp_avg_sq"],
                lr=group["lr"],
                beta1=group["beta1"],
                beta2=group["beta2"],
                eps=group["eps"],
                step=int(state["step"]),
                scale=scale,
                unit_rows=parameter in self.unit_rows,
            )


class Signum(torch.optim.Optimizer):
    """The sign of a running mean of gradients (Bernstein et al. 2018, algorithm 2).

    m <- momentum m + (1 - momentum) g,   parameter <- parameter - lr sign(m)
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay where they are."""
        del closure
        for group, parameter, gradient in _with_gradient(self):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            parameter.add_(state["momentum"].sign(), alpha=-group["lr"])


class _ScheduleFree(torch.optim.Optimizer):
    """What the schedule-free optimisers share; a subclass gives the direction d."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay where they are."""
        del closure
        for group, parameter, gradient in _with_gradient(self):
            state = self.state[parameter]
            if not state:
                device = parameter.device
                state["z"], state["x"] = parameter.clone(), parameter.clone()
                state["steps"] = torch.zeros((), dtype=torch.int64, device=device)
                state["lr_max"] = torch.zeros((), dtype=torch.float64, device=device)
                state["lr_sum"] = torch.zeros((), dtype=torch.float64, device=device)
            z, x, keep = state["z"], state["x"], 1 - group["beta"]
            moved = parameter - torch.lerp(x, z, keep)
            z.add_(moved)
            x.add_(moved)
            state["steps"] += 1
            # the largest rate so far, not the present one: were the rate to fall at the end, the
            # average would else forget the very steps that it is meant to keep
            state["lr_max"].clamp_(min=group["lr"])
            weight = state["lr_max"].square()
            state["lr_sum"] += weight
            z.sub_(self.direction(gradient, state, group), alpha=group["lr"])
            x.lerp_(z, (weight / state["lr_sum"]).to(x.dtype))
            torch.lerp(x, z, keep, out=parameter)

    def direction(
        self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor:
        """What z is moved against, of the parameter's shape."""
        raise NotImplementedError


class ScheduleFreeAdam(_ScheduleFree):
    """Schedule-free Adam (Defazio et al. 2024, algorithm 1, without weight decay).

    d = g / (sqrt(v / (1 - beta2^t)) + eps),   v <- beta2 v + (1 - beta2) g^2. The bias correction
    is in d; the paper has it in the learning rate, and so in the weights c of the first steps too.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        beta: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "beta2": beta2, "eps": eps})

    def direction(
        self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor:
        """The gradient over the root of its running mean square."""
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        square, beta2 = state["exp_avg_sq"], group["beta2"]
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = (1 - beta2 ** state["steps"].double()).to(square.dtype)
        return gradient / (square / correction).sqrt_().add_(group["eps"])


class ScheduleFreeSignum(_ScheduleFree):
    """Schedule-free sign descent: d = sign(g); the interpolation does the work of momentum."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, beta: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta})

    def direction(
        self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor:
        """The gradient's sign."""
        del state, group
        return gradient.sign()


def _with_gradient(
    optimiser: torch.optim.Optimizer,
) -> Iterator[tuple[dict[str, Any], nn.Parameter, Tensor]]:
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter, parameter.grad


@contextmanager
def averaged(
    optimiser: torch.optim.Optimizer, constrain: Callable[[], None] | None = None
) -> Iterator[None]:
    """A context in which parameters have the values to evaluate and release (x, if schedule-free).

    For schedule-free optimisers that is the average x; for the others nothing happens. Afterwards
    parameters have the bits they had before; nothing done to them inside is kept.

    Args: constrain puts a constraint on the parameters once they are there: `sae.after_step`, for
    decoder rows of unit norm.
    """
    if not isinstance(optimiser, _ScheduleFree):
        yield
        return
    pairs = [(group, each) for group in optimiser.param_groups for each in group["params"]]
    before = [parameter.detach().clone() for _, parameter in pairs]
    try:
        with torch.no_grad():
            for group, parameter in pairs:
                state = optimiser.state.get(parameter)
                if state:
                    # y may have been moved since the last step, and x is to be moved as much
                    moved = parameter - torch.lerp(state["x"], state["z"], 1 - group["beta"])
                    torch.add(state["x"], moved, out=parameter)
        if constrain is not None:
            constrain()
        yield
    finally:
        with torch.no_grad():
            for (_, parameter), bits in zip(pairs, before, strict=True):
                parameter.copy_(bits)


def feature_rows(sae: SparseAutoencoder) -> list[nn.Parameter]:
    """The parameters that have one row a feature: those whose first dimension is d_sae."""
    return [
        each
        for name, each in sae.named_parameters()
        if name not in _SHARED and each.ndim and each.shape[0] == sae.d_sae
    ]


@torch.no_grad()
def clear_rows(optimiser: torch.optim.Optimizer, sae: SparseAutoencoder, features: Tensor) -> None:
    """Reset the optimiser's state of features, int64 [n], that were re-initialised.

    Moments of their rows become 0; schedule-free points become the parameter's own new rows.
    """
    for parameter in feature_rows(sae):
        state = optimiser.state.get(parameter, {})
        for moment in _MOMENTS:
            if moment in state:
                state[moment][features] = 0
        for point in _POINTS:
            if point in state:
                state[point][features] = parameter[features]
