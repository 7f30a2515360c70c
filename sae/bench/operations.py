"""The operations of a step, one by one, on the codes that TopK gives."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae import kernels
from sae.bench.dense import LR, update
from sae.bench.inputs import Inputs
from sae.bench.steps import AUTO, DENSE, Setting
from sae.kernels import fastest, operations, torch_backend
from sae.training.optimisers import Adam
from saescope.errors import InputError

OPERATIONS = (
    "encode_topk",
    "encode_above",
    "decode",
    "decode_error",
    "weight_gradients",
    "optimiser_step",
)
"""weight_gradients: of both W_enc and W_dec; optimiser_step: projection, clipping, Adam and
renormalisation of both"""


@dataclass(frozen=True)
class Problem:
    """The tensors that operations are timed on."""

    inputs: Inputs
    k: int
    x: Tensor
    """[batch, d_in]"""
    row_ptr: Tensor
    index: Tensor
    value: Tensor
    error: Tensor
    """[batch, d_in]"""
    threshold: Tensor
    """[d_sae], that k of a row's pre-activations exceed on average"""

    @property
    def l0(self) -> float:
        """Entries of a row."""
        return len(self.index) / len(self.x)


def make_problem(inputs: Inputs, k: int, dtype: torch.dtype = torch.float32) -> Problem:
    """Codes of the first batch, and their error."""
    x, W, b = inputs.x[0].to(dtype), inputs.W_enc_T.to(dtype), inputs.b_enc.to(dtype)
    index, value = torch_backend.topk(x, W, b, k)
    row_ptr = torch.arange(len(x) + 1, device=x.device) * k
    index, value = index.reshape(-1), value.relu().reshape(-1)
    error = torch_backend.decode(row_ptr, index, value, inputs.W_dec.to(dtype)) - x
    sample = (x[:: max(1, len(x) // 512)] @ W.T + b).float()
    bar = sample.view(-1).topk(k * len(sample), sorted=False).values.min()
    return Problem(
        inputs, k, x, row_ptr, index, value, error, bar.to(dtype).expand(len(W)).contiguous()
    )


def make_operation(name: str, setting: Setting, problem: Problem) -> Callable[[], object]:
    """A function that does an operation once; InputError for an unknown name."""
    if name not in OPERATIONS:
        raise InputError("no such operation", where="operations", given=name, allowed=OPERATIONS)
    if name == "optimiser_step":
        return _optimiser(setting, problem)
    p, inputs = problem, problem.inputs
    which = kernels.backend(p.x) if setting.name == AUTO else setting.backend
    backend = kernels.module(which)
    dtype = p.x.dtype
    W_enc_T, W_dec, b_enc = (
        each.to(dtype) for each in (inputs.W_enc_T, inputs.W_dec, inputs.b_enc)
    )
    b_dec, d_sae, codes = p.x.new_zeros(p.x.shape[1]), len(W_dec), (p.row_ptr, p.index, p.value)

    def gradients() -> None:
        backend.weight_gradient(*codes, p.error, d_sae)
        backend.weight_gradient(*codes, p.x, d_sae)

    calls: dict[str, Callable[[], object]] = {
        "encode_topk": lambda: backend.topk(p.x, W_enc_T, b_enc, p.k),
        "encode_above": lambda: backend.above(p.x, W_enc_T, b_enc, p.threshold),
        "decode": lambda: backend.decode(*codes, W_dec),
        "decode_error": lambda: backend.decode_error(*codes, W_dec, b_dec, p.x),
        "weight_gradients": gradients,
    }
    return _within(setting, problem, calls[name])


def _within(setting: Setting, problem: Problem, call: Callable[[], object]) -> Callable[[], object]:
    like, W = problem.x, problem.inputs.W_dec
    chosen: dict[str, str] = {}
    if setting.name == AUTO and kernels.backend(like) == operations.OWN:
        chosen = fastest.backends(fastest.Shape(len(like), *W.shape[::-1]))

    def run() -> None:
        with setting.active(like), operations.using(chosen):
            call()

    return run


def _optimiser(setting: Setting, problem: Problem) -> Callable[[], object]:
    inputs = problem.inputs
    W_enc_T, W_dec = (nn.Parameter(each.clone()) for each in (inputs.W_enc_T, inputs.W_dec))
    for each in (W_enc_T, W_dec):
        each.grad = torch.full_like(each, 1e-3)
    if setting.name in DENSE:
        plain = torch.optim.Adam((W_enc_T, W_dec), lr=LR, fused=True)
        return lambda: update(plain, (W_enc_T, W_dec), (W_dec,))
    ours = Adam((W_enc_T, W_dec), lr=LR, unit_rows=(W_dec,))

    def step() -> None:
        squares = torch.stack(list(ours.gradient_squares().values()))
        ours.step(scale=min(1.0, 1.0 / (float(squares.sum().sqrt()) + 1e-6)))

    return _within(setting, problem, step)
