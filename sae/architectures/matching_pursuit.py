"""MP-SAE: k greedy steps of matching pursuit in a unit-norm dictionary (Costa et al. 2025,
arXiv 2506.03093), or orthogonal matching pursuit.

r_0 = y - b_dec;   for t = 1..k:   j_t = argmax_j <r_{t-1}, d_j>,   c_t = max(<r_{t-1}, d_{j_t}>, 0)
                                 r_t = r_{t-1} - c_t d_{j_t}
f_j = sum of c_t over steps with j_t = j,   y_hat = f W_dec + b_dec,   loss = FVU + 1/32 AuxK

One dictionary both encodes and decodes; there is no encoder bias. Activations are not negative, as
in the authors' code: a row stops when nothing correlates positively with what is left of it. An
atom may be chosen again, so L0 <= k. Gradients run through all k steps with the choices held fixed.

Under `orthogonal` a step takes the largest |<r, d_j>| and refits all chosen coefficients by least
squares (Pati et al. 1993). Codes are then signed, and constants to the gradient: without a mask
the gradient through least squares is zero, and with one that is how Chidambaram et al. (2023,
"Hiding Data Helps") train, whose pursuit sees the dictionary's visible coordinates alone.

Costs a batch: B d_sae d_in multiplications for each of k steps; or, in a dictionary of up to 8192
atoms, one Gram matrix (d_sae^2 d_in, d_sae^2 numbers) and B d_sae for each step.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sae.architectures import register
from sae.architectures._auxk import AuxKConfig
from sae.architectures._tied import TiedSAE
from sae.core.base import SAEConfig, TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.plain import Rule
from sae.kernels.codes import SparseCodes
from sae.kernels.torch_backend import topk_by_groups
from saescope.errors import InputError, check_range

_CHUNK_ELEMENTS = 2**20
"""correlations held at a time"""
_GRAM_WIDTH = 8192
"""widest dictionary whose Gram matrix is made"""
_ROUNDING = 10
"""coefficients of so many rounding errors of a row's norm are 0: an atom just taken out correlates
with what is left by rounding alone"""


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitConfig(AuxKConfig):
    """Configuration of the matching-pursuit architecture."""

    k: int = 32
    """Steps a token, each of which chooses a feature (so L0 is at most k)."""
    kind: Literal["matching_pursuit"] = "matching_pursuit"
    """Name of the architecture."""
    repeats: bool = True
    """An atom may be chosen again, as in the paper: L0 is at most k. If false, each at most once,
    which brings L0 to k."""
    orthogonal: bool = False
    """Refit all chosen coefficients at each step (OMP, with signed codes)."""
    residual_threshold: float = 0.0
    """A row stops once what is left of it has a norm below this, in the units of the normaliser; 0
    never stops it. SAELens' pursuits have it. Not with orthogonal."""
    stop_on_duplicate: bool = False
    """A row stops after a step that chose no new atom, as SAELens' pursuits do. Not with
    orthogonal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_k("k", self.k)
        check_range("sae.residual_threshold", self.residual_threshold, low=0)
        if self.orthogonal and (self.residual_threshold or self.stop_on_duplicate):
            raise InputError(
                "orthogonal pursuit takes all its steps",
                where="sae.orthogonal",
                given={
                    "residual_threshold": self.residual_threshold,
                    "stop_on_duplicate": self.stop_on_duplicate,
                },
            )


@register
class MatchingPursuitSAE(TiedSAE):
    """Chooses features one by one, each by what the earlier ones left of the token."""

    Config: ClassVar[type[SAEConfig]] = MatchingPursuitConfig
    config: MatchingPursuitConfig

    has_encoder_bias: ClassVar[bool] = False
    refits_visible: ClassVar[bool] = True
    plain_rules: ClassVar[tuple[Rule, ...]] = ("matching_pursuit",)

    @property
    def signed(self) -> bool:  # type: ignore[override]
        """Least-squares coefficients may be negative."""
        return self.config.orthogonal

    def _codes(self, centred: Tensor, visible: Tensor | None = None) -> SparseCodes:
        config = self.config
        atoms, norm = self.W_dec, None
        if visible is not None:
            seen = self.W_dec * visible
            norm = seen.norm(dim=1).clamp_min(torch.finfo(seen.dtype).tiny)
            atoms = seen / norm[:, None]
        if config.orthogonal:
            index, value = orthogonal_pursuit(centred, atoms, config.k)
            norm = None if norm is None else norm.detach()  # codes are constants
        else:
            stop = Stop(config.residual_threshold, config.stop_on_duplicate)
            index, value = matching_pursuit(
                centred, atoms, config.k, repeats=config.repeats, stop=stop
            )
        if norm is not None:
            value = value / norm[index]
        return merge(index, value, self.d_sae)

    def plain_parts(self) -> dict[str, Any]:
        """The rule of SAELens' pursuits: no encoder, atoms repeat, not orthogonal.

        Raises InputError for other pursuits.
        """
        config = self.config
        if config.orthogonal or not config.repeats:
            raise InputError(
                "other libraries have no rule for orthogonal pursuit, or for one without repeats",
                where="sae",
                given={"orthogonal": config.orthogonal, "repeats": config.repeats},
            )
        stopping = {
            "residual_threshold": config.residual_threshold,
            "stop_on_duplicate": config.stop_on_duplicate,
        }
        pursuit = {"k": config.k, **stopping}
        return {"activation": "matching_pursuit", "W_enc": None, "pursuit": pursuit}

    def fold_parameters(self, feature_scale: float) -> None:
        """The residual's norm is counted in the model's units too."""
        super().fold_parameters(feature_scale)
        threshold = self.config.residual_threshold / feature_scale
        self.config = replace(self.config, residual_threshold=threshold)

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in]: each feature once, none that is 0."""
        return self._codes(self.encoder_input(y))

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """FVU + coefficient * AuxK, whose dead features go on where the pursuit stopped."""
        centred = self.centred(batch)
        codes = self._codes(centred, batch.visible)
        found = self.reconstruct(codes, batch)
        terms = {"fvu": found.loss.detach()}
        left = batch.mask_input((batch.y - found.y_hat).detach())
        loss = self.add_auxk(found.loss, terms, left, found, state)
        return TrainingOutput(loss, terms, codes.counts(), found)


class Stop(NamedTuple):
    """What ends a row's pursuit before its k steps."""

    residual: float = 0.0
    """a norm of the residual below this; 0 does not"""
    duplicate: bool = False
    """a step that chooses no new atom, which still counts"""


class _Pursuit(Function):
    """Matching pursuit; the backward pass walks the steps back, rebuilding each residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, atoms: Tensor, k: int, repeats: bool, stop: Stop
    ) -> tuple[Tensor, Tensor]:
        # half precision would lose the residual's last steps
        exact = torch.promote_types(x.dtype, torch.float32)
        index, value, residual = _pursue(x.to(exact), atoms.to(exact), k, repeats, stop)
        value, residual = value.to(x.dtype), residual.to(x.dtype)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(atoms, index, value, residual)
        return index, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        atoms, index, value, residual = ctx.saved_tensors
        d_residual, d_atoms = torch.zeros_like(residual), torch.zeros_like(atoms)
        for step in reversed(range(index.shape[1])):
            chosen, c = index[:, step], value[:, step, None]
            d = atoms[chosen]
            residual = residual + c * d
            d_c = gradients[1][:, step, None] - (d_residual * d).sum(1, keepdim=True)
            d_c = torch.where(c > 0, d_c, 0.0)
            d_atoms.index_add_(0, chosen, d_c * residual - c * d_residual)
            d_residual = d_residual + d_c * d
        return d_residual, d_atoms, None, None, None


def matching_pursuit(
    x: Tensor, atoms: Tensor, k: int, *, repeats: bool = True, stop: Stop | None = None
) -> tuple[Tensor, Tensor]:
    """k greedy steps: (index, value) [batch, k] in order; value 0 once a row has stopped.

    x [batch, d_in]; atoms [d_sae, d_in], unit rows. Differentiable in both.
    """
    index, value = _Pursuit.apply(x, atoms, k, repeats, stop or Stop())  # type: ignore[misc]
    return index, value


@torch.no_grad()
def _pursue(
    x: Tensor, atoms: Tensor, k: int, repeats: bool, stop: Stop
) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    value = torch.zeros(len(x), k, dtype=x.dtype, device=x.device)
    residual = x.clone()
    least = _ROUNDING * torch.finfo(x.dtype).eps * x.norm(dim=1, keepdim=True)
    d_sae = len(atoms)
    rows = max(1, _CHUNK_ELEMENTS // d_sae)
    # choices are made in full precision, whatever autocast says
    with torch.autocast(x.device.type, enabled=False):
        worth_it = d_sae <= _GRAM_WIDTH and d_sae < (k - 1) * len(x)
        gram = atoms @ atoms.T if worth_it else None
        for start in range(0, len(x), rows):
            block = slice(start, start + rows)
            correlation = residual[block] @ atoms.T
            going = torch.ones_like(least[block], dtype=torch.bool)
            for step in range(k):
                chosen = topk_by_groups(correlation, 1)[1][:, 0]
                d = atoms[chosen]
                c = (residual[block] * d).sum(1, keepdim=True)
                c = torch.where((c > least[block]) & going, c, 0.0)
                residual[block] -= c * d
                if stop.residual:
                    going &= residual[block].norm(dim=1, keepdim=True) >= stop.residual
                if stop.duplicate:
                    same = (index[block, :step] == chosen[:, None]) & (value[block, :step] > 0)
                    going &= (c > 0) & ~same.any(1, keepdim=True)
                index[block, step], value[block, step] = chosen, c[:, 0]
                if gram is None:
                    correlation = residual[block] @ atoms.T
                else:
                    correlation.addcmul_(gram[chosen], c, value=-1)
                if not repeats:
                    used = index[block, : step + 1]
                    correlation.scatter_(1, used, -torch.inf)
    return index, value, residual


@torch.no_grad()
def orthogonal_pursuit(x: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k steps of orthogonal matching pursuit: (index, value) [batch, k], no atom twice in a row.

    x [batch, d_in]; atoms [d_sae, d_in], unit rows. value, signed, is the least-squares fit of x by
    the chosen atoms, 0 once nothing is left to explain. No gradient.
    """
    rows = max(1, _CHUNK_ELEMENTS // len(atoms))
    with torch.autocast(x.device.type, enabled=False):
        blocks = [_orthogonal(chunk, atoms, k) for chunk in x.split(rows)]
    return torch.cat([block[0] for block in blocks]), torch.cat([block[1] for block in blocks])


def _orthogonal(x: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The chosen atoms are orthonormalised as they come: A = Q R, and then R z = Q x."""
    n, width = x.shape
    # triangular systems are not solved in half precision
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, atoms = x.to(exact), atoms.to(exact)
    index = torch.zeros(n, k, dtype=torch.int64, device=x.device)
    basis = x.new_zeros(k, n, width)
    triangle = torch.eye(k, dtype=exact, device=x.device).repeat(n, 1, 1)
    along = x.new_zeros(n, k, 1)
    residual = x.clone()
    eps = _ROUNDING * torch.finfo(exact).eps
    least = eps * x.norm(dim=1)
    for step in range(k):
        size = (residual @ atoms.T).abs_().scatter_(1, index[:, :step], -1.0)
        found, chosen = (each[:, 0] for each in topk_by_groups(size, 1))
        before = rearrange(basis[:step], "earlier row d_in -> row earlier d_in")
        new = atoms[chosen]
        parallel = torch.zeros_like(triangle[:, :step, step])
        for _ in range(2):  # the second pass removes what rounding left of the first
            in_basis = torch.bmm(before, new[..., None])
            new = new - torch.bmm(before.mT, in_basis)[..., 0]
            parallel = parallel + in_basis[..., 0]
        norm = new.norm(dim=1)
        going = (found > least) & (norm > eps)
        new = torch.where(going[:, None], new / norm[:, None], 0.0)
        index[:, step], basis[step] = chosen, new
        triangle[:, :step, step] = torch.where(going[:, None], parallel, 0.0)
        triangle[:, step, step] = torch.where(going, norm, 1.0)
        along[:, step] = (new * x).sum(1, keepdim=True)
        residual = residual - new * (new * residual).sum(1, keepdim=True)
    value = torch.linalg.solve_triangular(triangle, along, upper=True)[..., 0]
    return index, value.to(dtype)


def merge(index: Tensor, value: Tensor, d_sae: int) -> SparseCodes:
    """Codes from steps (index, value) [batch, k]: equal features added up, zeros left out.

    >>> merge(torch.tensor([[4, 2, 4]]), torch.tensor([[1.0, 2.0, 0.5]]), 6).dense().tolist()
    [[0.0, 0.0, 2.0, 0.0, 1.5, 0.0]]
    """
    batch, k = index.shape
    taken = value.detach() != 0
    row = torch.arange(batch, device=index.device)[:, None].expand(batch, k)
    keys, entry = (row * d_sae + index)[taken].unique(return_inverse=True)
    added = value.new_zeros(len(keys)).index_add(0, entry, value[taken])
    row_ptr = torch.zeros(batch + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(torch.bincount(keys // d_sae, minlength=batch), 0, out=row_ptr[1:])
    return SparseCodes(row_ptr, keys % d_sae, added, d_sae)
