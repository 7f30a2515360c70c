"""The baseline: a training step as one writes it in plain torch, all products dense.

Encoder, decoder and their four gradients (that of the encoder's input is there for b_dec), then
projection, clipping, fused Adam and renormalisation, and counters of dead features.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sae.architectures._ste import jump_relu, step
from sae.bench.inputs import Inputs
from saescope.errors import InputError

KINDS = ("topk", "batchtopk", "relu", "jumprelu")
"""architectures written here"""
Products = Literal["torch", "onednn", "bfloat16"]
"""what multiplies: torch's default, oneDNN in float32, or torch under bfloat16 autocast"""
LR = 1e-6
"""so small that every library steps on the same weights throughout"""
SILENT = 10**9
"""tokens for which a feature that is to count as dead has not fired"""
_DEAD_AFTER = 10**8
_ROWS = 512
"""of the product, at a time"""
_AUXK, _PENALTY, _BANDWIDTH = 1 / 32, 0.01, 2.0


def has_onednn() -> bool:
    """Whether torch has the operator that oneDNN's float32 product is reached through."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN; torch.mm goes to MKL where there is one."""
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


class _OneDNNLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.biased = b is not None
        return onednn(x, W, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = gradients
        x, W = ctx.saved_tensors
        d_b = gradient.sum(0) if ctx.biased else None
        return onednn(gradient, W.T, None), onednn(gradient.T, x.T, None), d_b


class DenseStep(nn.Module):
    """Training steps of an architecture in plain torch.

    Raises InputError for an architecture that is not written here, or products torch lacks.
    """

    def __init__(self, inputs: Inputs, kind: str, l0: float, products: Products = "torch") -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError("no dense step", where="architectures", given=kind, allowed=KINDS)
        if products == "onednn" and not has_onednn():
            raise InputError("this torch has no such operator", where="products", given=products)
        self.inputs, self.kind, self.l0, self.products = inputs, kind, l0, products
        self.k_aux = max(1, inputs.x.shape[-1] // 2)
        self.variance = inputs.variance
        self.W_enc = nn.Parameter(inputs.W_enc_T.clone())
        self.b_enc = nn.Parameter(inputs.b_enc.clone())
        self.W_dec = nn.Parameter(inputs.W_dec.clone())
        self.b_dec = nn.Parameter(torch.zeros_like(inputs.x[0, 0]))
        if kind == "jumprelu":
            self.threshold = nn.Parameter(inputs.threshold.clone())
        self.optimiser = torch.optim.Adam(self.parameters(), lr=LR, fused=True)
        self.silent = torch.zeros(len(self.W_dec), dtype=torch.int64, device=self.W_dec.device)
        self.found: dict[str, float] = {}

    def mark(self, dead: Tensor) -> None:
        """Let features bool [d_sae] count as dead."""
        self.silent[dead] = SILENT

    def step(self, x: Tensor) -> None:
        """One step on rows [batch, d_in]."""
        self.optimiser.zero_grad(set_to_none=True)
        low = self.products == "bfloat16"
        dead = self.silent >= _DEAD_AFTER
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            loss, acts = self._loss(x, dead)
        loss.backward()
        unit_rows = () if self.kind == "relu" else (self.W_dec,)
        norm = update(self.optimiser, list(self.parameters()), unit_rows)
        with torch.no_grad():
            fired = acts > 0
            self.silent += len(x)
            self.silent[fired.any(0)] = 0
        # what a trainer writes down
        self.found = {
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "l0": float(fired.sum()) / len(x),
            "dead": float(dead.sum()),
        }

    @torch.no_grad()
    def measure(self, x: Tensor) -> dict[str, float]:
        """Mean L0 and squared error of rows [batch, d_in]."""
        acts = self._activate(self._linear(x - self.b_dec, self.W_enc, self.b_enc))
        error = x - self._linear(acts, self.W_dec.T) - self.b_dec
        return {
            "l0": float((acts > 0).sum()) / len(x),
            "squared_error": float(error.square().sum(1).mean()),
        }

    def _linear(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        if self.products == "onednn":
            return _OneDNNLinear.apply(x, W, b)  # type: ignore[return-value]
        return functional.linear(x, W, b)

    def _loss(self, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
        pre = self._linear(x - self.b_dec, self.W_enc, self.b_enc)
        acts = self._activate(pre)
        x_hat = self._linear(acts, self.W_dec.T) + self.b_dec
        residual = x - x_hat
        loss = residual.square().sum(1).mean() / self.variance
        if self.kind == "relu":
            norm = self.W_dec.norm(dim=1)
            loss = loss + _PENALTY * (acts * norm).sum(1).mean() / self.variance**0.5
        elif self.kind == "jumprelu":
            counted = step(pre, self.threshold.expand_as(pre), _BANDWIDTH).sum(1).mean()
            loss = loss + _PENALTY * counted / x.shape[1]
        elif dead.any():
            loss = loss + _AUXK * self._auxk(pre, residual.detach(), dead)
        return loss, acts

    def _activate(self, pre: Tensor) -> Tensor:
        if self.kind == "relu":
            return pre.relu()
        if self.kind == "jumprelu":
            return jump_relu(pre, self.threshold.expand_as(pre), _BANDWIDTH)
        if self.kind == "topk":
            top = pre.topk(round(self.l0), dim=1, sorted=False)
            return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        flat = pre.relu().view(-1)
        top = flat.topk(round(self.l0 * len(pre)), sorted=False)
        return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(pre)

    def _auxk(self, pre: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        rows = dead.nonzero()[:, 0]
        acts = pre[:, rows]
        if len(rows) > self.k_aux:
            top = acts.topk(self.k_aux, dim=1, sorted=False)
            acts = torch.zeros_like(acts).scatter(1, top.indices, top.values)
        left = residual - acts.relu() @ self.W_dec[rows]
        return left.square().sum() / (residual - residual.mean(0)).square().sum()


class ProductStep(DenseStep):
    """Only the dense product that every exact step contains: x W_enc, some rows at a time.

    No exact step of the same product can take less.
    """

    @torch.no_grad()
    def step(self, x: Tensor) -> None:
        """The product of rows [batch, d_in]."""
        multiply = onednn if self.products == "onednn" else functional.linear
        for rows in x.split(_ROWS):
            multiply(rows, self.W_enc, None)
        self.found = {"l0": 0.0, "dead": float((self.silent >= _DEAD_AFTER).sum())}


@torch.no_grad()
def update(
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    unit_rows: Sequence[nn.Parameter],
) -> Tensor:
    """The end of a step, after the gradients, in torch's operations; the gradient's norm.

    Projection and renormalisation of parameters with rows of unit norm, clipping, a step.
    """
    for each in unit_rows:
        assert each.grad is not None, "gradients come first"
        along = (each.grad * each).sum(1, keepdim=True)
        each.grad.addcmul_(each, along, value=-1)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    for each in unit_rows:
        each.div_(each.norm(dim=1, keepdim=True))
    return norm
