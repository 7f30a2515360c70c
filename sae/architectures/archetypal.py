"""RA-SAE: TopK with decoder rows near the convex hull of data points (Fel et al. 2025, arXiv
2502.12892), which makes dictionaries of different runs agree more.

W_dec = A C + Lambda;   A [d_sae, N]: A >= 0, rows sum to 1;   ||Lambda_i|| <= delta
f = ReLU(TopK_k(W_enc^T (y - b_dec) + b_enc)),   y_hat = f W_dec + b_dec,   loss = FVU + 1/32 AuxK

C holds N candidates, fixed at the start of training: rows of the first batch less b_dec, or their
k-means centres. A's rows are put back on the simplex after each step (clipped at 0, divided by
their sum), and Lambda's into the ball. The rows of W_dec do not have unit norm, which would take
them off the hull; the scale that they lack is in the activations. So the paper's common factor of
the whole dictionary is not needed.

W_dec is computed from A, C and Lambda: d_sae N d_in multiplications a step. Outside of training it
is kept until one of them changes. A released SAE keeps them, to tell which points an atom is of.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sae.architectures import register
from sae.architectures.topk import TopKFields, TopKSAE
from sae.core.base import SAEConfig, TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.kernels.fixed_order_sums import product
from saescope.errors import InputError, check_choice, check_range

_KMEANS_ITERATIONS = 20


@dataclass(frozen=True, kw_only=True)
class ArchetypalConfig(TopKFields):
    """Configuration of the archetypal architecture."""

    kind: Literal["archetypal"] = "archetypal"
    """Name of the architecture."""
    n_candidates: int = 1024
    """Candidate points N that decoder rows are mixtures of; memory d_sae N."""
    candidates: Literal["kmeans", "sample"] = "kmeans"
    """Candidates are k-means centres of the first batch's rows, or those rows themselves."""
    delta: float = 0.3
    """Largest norm of a row of Lambda, in units of the candidates' root mean square norm. 0 holds
    decoder rows to the convex hull (A-SAE), which reconstructs worse; about 1 leaves them free."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.n_candidates", self.n_candidates, low=1)
        check_range("sae.delta", self.delta, low=0)
        check_choice("no such candidates", "sae.candidates", self.candidates, ("kmeans", "sample"))


@register
class ArchetypalSAE(TopKSAE):
    """TopK whose decoder rows are mixtures of data points, up to a small relaxation."""

    Config: ClassVar[type[SAEConfig]] = ArchetypalConfig
    config: ArchetypalConfig  # type: ignore[assignment]
    by_feature: ClassVar[tuple[str, ...]] = ()

    unit_decoder: ClassVar[bool] = False
    first_rows: ClassVar[int] = 2

    points: Tensor
    """C [N, d_out], at the normaliser's scale"""

    def make_parameters(self) -> None:
        """Create A, C and Lambda in place of W_dec."""
        n = self.config.n_candidates
        self._held: Tensor | None = None
        self._known: tuple[object, Tensor] | None = None
        self.W_enc_T = nn.Parameter(torch.empty(self.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.mixture = nn.Parameter(torch.zeros(self.d_sae, n))
        self.relaxation = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.register_buffer("points", torch.empty(n, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random unit points until `start` takes them from data; each atom at one, biases 0."""
        nn.init.normal_(self.points)
        self._set_points(self.points / self.points.norm(dim=1, keepdim=True))
        nn.init.zeros_(self.b_enc)
        nn.init.zeros_(self.b_dec)

    @torch.no_grad()
    def start(self, batch: TrainingBatch) -> None:
        """b_dec at the geometric median; candidates from the batch's rows less b_dec.

        A batch of fewer rows than candidates gives each of its rows several times. Raises
        InputError for rows that are all equal, as a single one is: they span nothing.
        """
        if torch.equal(batch.target, batch.target[:1].expand_as(batch.target)):
            raise InputError(
                "candidates come from the first batch, whose rows are all equal",
                where="sae.kind",
                given=f"archetypal, {len(batch)} rows",
                allowed="at least 2 rows that differ; raise trainer.batch_size or lower accumulate",
            )
        super().start(batch)
        rows = batch.target - self.b_dec
        n = self.config.n_candidates
        if len(rows) <= n:
            points = rows[torch.arange(n, device=rows.device) % len(rows)]
        elif self.config.candidates == "kmeans":
            points = kmeans(rows, n)
        else:
            points = rows[spread(len(rows), n, rows.device)]
        self._set_points(points)

    def _set_points(self, points: Tensor) -> None:
        """Take candidates; atom i at candidate i, those beyond N half-way between two."""
        self.points.copy_(points)
        n = len(points)
        atom = torch.arange(self.d_sae, device=points.device)
        first, lap = atom % n, atom // n
        second = (first + lap) % n
        self.mixture.zero_()
        self.mixture[atom, first] = 0.5
        self.mixture[atom, second] += 0.5
        self.relaxation.zero_()
        if self.d_in == self.d_out:
            tiny = torch.finfo(points.dtype).tiny
            W_dec = self.atoms()
            self.W_enc_T.copy_(W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(tiny))
        else:
            nn.init.normal_(self.W_enc_T, std=self.d_in**-0.5)

    def atoms(self) -> Tensor:
        """A C + Lambda [d_sae, d_out], differentiable."""
        return product(self.mixture, self.points) + self.relaxation

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """Decoder rows [d_sae, d_out]."""
        if self._held is not None:
            return self._held
        if self.training and torch.is_grad_enabled():
            return self.atoms()
        factors = (self.mixture, self.points, self.relaxation)
        version = [(each.data_ptr(), each._version, each.dtype, each.device) for each in factors]
        if self._known is None or self._known[0] != version:
            with torch.no_grad():
                self._known = version, self.atoms()
        return self._known[1]

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """As TopK's, with W_dec computed once for all its uses."""
        self._held = self.atoms()
        try:
            return super().training_output(batch, state)
        finally:
            self._held = None

    @torch.no_grad()
    def constrain(self) -> None:
        """Put A's rows back on the simplex and Lambda's into the ball."""
        self.mixture.clamp_min_(0)
        total = self.mixture.sum(1, keepdim=True)
        # a row that lost all its weight starts again from all candidates alike
        self.mixture.add_((total == 0).to(total.dtype))
        self.mixture.div_(self.mixture.sum(1, keepdim=True))
        norm = self.relaxation.norm(dim=1, keepdim=True)
        tiny = torch.finfo(norm.dtype).tiny
        self.relaxation.mul_((self.radius / norm.clamp_min(tiny)).clamp_max(1))

    def fold_parameters(self, feature_scale: float) -> None:
        """Scale what W_dec is made of as W_dec is to be; called on the folded copy."""
        super().fold_parameters(feature_scale)
        factor = feature_scale / self.normaliser_out.scale
        self.points.mul_(factor)
        self.relaxation.mul_(factor)

    @property
    def radius(self) -> Tensor:
        """Largest norm of a row of Lambda, at the scale of the candidates."""
        return self.config.delta * self.points.square().sum(1).mean().sqrt()


def spread(total: int, n: int, device: torch.device) -> Tensor:
    """n numbers below total, evenly spaced: int64 [n]."""
    return torch.arange(n, device=device) * total // n


def kmeans(rows: Tensor, n: int) -> Tensor:
    """Centres [n, d] of rows [batch, d] by Lloyd's iteration from evenly spaced rows.

    Deterministic. A centre that loses all its rows stays where it was.
    """
    centres = rows[spread(len(rows), n, rows.device)].clone()
    for _ in range(_KMEANS_ITERATIONS):
        nearest = torch.cdist(rows, centres).argmin(1)
        count = torch.bincount(nearest, minlength=n)
        total = torch.zeros_like(centres).index_add_(0, nearest, rows)
        moved = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
