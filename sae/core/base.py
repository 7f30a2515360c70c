"""What every sparse autoencoder is: parameters, encode, decode, forward, fold, save.

Units. Everything public (x, activations, x_hat) is in the model's own units; inside, an SAE works
at the scale of its normaliser. With y = (x - m) s and a positively homogeneous activation function
the two agree: f = f_y / s and x_hat = f W_dec + (m + b_dec / s). A released SAE is folded: its
weights are in the model's units themselves.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sae import kernels
from sae.core import losses
from sae.core.batch import TrainingBatch
from sae.core.finite import check_rows
from sae.core.normaliser import Normaliser
from sae.core.outputs import SAEOutput, TrainingOutput, TrainingState
from sae.distributed import FEATURES, normal_rows_
from sae.kernels.codes import SparseCodes
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.integers import as_index


@dataclass(frozen=True, kw_only=True)
class SAEConfig(Config):
    """What every architecture's configuration has; each adds its own fields and its `kind`."""

    d_sae: int = 8192
    """Width of the dictionary (number of features)."""

    def __post_init__(self) -> None:
        check_range("sae.d_sae", self.d_sae, low=1)

    def with_target_l0(self, target: float) -> Self:
        """The same configuration for a mean L0 of `target`: sets k, where there is one.

        Raises InputError if k cannot be that.
        """
        kinds = {each.name: each.type for each in fields(self)}
        if "k" not in kinds:
            return self
        if kinds["k"] in (int, "int"):
            if target != round(target):
                raise InputError(
                    "k is a whole number here",
                    where="target_l0",
                    given=target,
                    allowed=str(round(target)),
                )
            target = round(target)
        return replace(self, k=target)


class SparseAutoencoder(nn.Module, ABC):
    """A sparse autoencoder; a subclass is one architecture in one file of `sae/architectures/`.

    W_enc_T and W_dec are both kept one feature a row, [d_sae, d_in] and [d_sae, d_out], as the
    sparse kernels read them. d_out is d_in but for transcoders.
    """

    Config: ClassVar[type[SAEConfig]]
    penalised: ClassVar[bool] = False
    """sparsity comes from a penalty: the trainer can steer L0 through `TrainingState.penalty`"""
    signed: ClassVar[bool] = False
    """activations may be negative"""
    pre_bias: ClassVar[bool] = True
    """the encoder sees y - b_dec; otherwise y"""
    batch_level: ClassVar[bool] = False
    """training selects over the whole batch, inference by stored thresholds"""
    transcodes: ClassVar[bool] = False
    """what is reconstructed is the activation at another site"""
    concatenates: ClassVar[bool] = False
    """reads and writes several sites at once, side by side"""
    unit_decoder: ClassVar[bool] = True
    """decoder rows are held at unit norm"""
    first_rows: ClassVar[int] = 1
    """rows that `start` needs"""
    by_feature: ClassVar[tuple[str, ...]] = ()
    """parameters and buffers with a row a feature; where they are named, ranks may share the
    features out: each then has an SAE of its own features, whose `d_sae` counts those"""
    feature_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    """parameters and buffers that are in the units of activations"""
    full_precision: ClassVar[tuple[str, ...]] = ()
    """parameters and buffers that do not go below float32 when the module is cast"""

    def __init__(self, config: SAEConfig, d_in: int, d_out: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.d_in = as_index(d_in, where="d_in", low=1)
        self.d_out = self.d_in if d_out is None else as_index(d_out, where="d_out", low=1)
        self.d_sae = self._own_features()
        self.normaliser = Normaliser.identity(self.d_in)
        self.output_normaliser: Normaliser | None = None
        self.site_normalisers: dict[str, Normaliser] = {}
        self.metadata: dict[str, Any] = {}
        self.make_parameters()
        self.reset_parameters()

    def _own_features(self) -> int:
        """Features that are here: all, unless ranks share them out."""
        if FEATURES.size > 1 and not self.by_feature:
            raise InputError(
                "features of this architecture cannot be shared out among processes",
                where="ranks",
                given=kind_of(self.config),
                allowed="rows",
            )
        check_range("sae.d_sae", self.config.d_sae, low=FEATURES.size)
        own = FEATURES.share(self.config.d_sae)
        return own.stop - own.start

    def make_parameters(self) -> None:
        """Create the parameters, before `reset_parameters` gives them values."""
        self.W_enc_T = nn.Parameter(torch.empty(self.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(torch.empty(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as every module's, but for `full_precision`."""
        before = {name: getattr(self, name, None) for name in self.full_precision}
        kept = {name: each.detach() for name, each in before.items() if each is not None}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            found = getattr(self, name)
            if found.dtype.itemsize < 4 <= value.dtype.itemsize:
                found.data = value.to(found.device)
                found.grad = None
        return self

    @property
    def W_enc(self) -> Tensor:
        """Encoder weights [d_in, d_sae] (a view of W_enc_T)."""
        return self.W_enc_T.T

    @property
    def normaliser_out(self) -> Normaliser:
        """The normaliser of what is reconstructed."""
        return self.normaliser if self.output_normaliser is None else self.output_normaliser

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decoder rows uniform on the unit sphere, W_enc = W_dec^T, biases 0."""
        normal_rows_(self.W_dec, self.config.d_sae)
        self.normalise_decoder()
        if self.d_in == self.d_out:
            self.W_enc_T.copy_(self.W_dec)
        else:
            nn.init.normal_(self.W_enc_T, std=self.d_in**-0.5)
        nn.init.zeros_(self.b_enc)
        nn.init.zeros_(self.b_dec)

    # ---- what an architecture says of itself ------------------------------------------------

    @abstractmethod
    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in] one row at a time, both at the normaliser's scale."""

    @abstractmethod
    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """The objective on a batch at the normaliser's scale."""

    @torch.no_grad()
    def start(self, batch: TrainingBatch) -> None:
        """Set what is initialised from data, before the first step; b_dec at the median."""
        self.b_dec.copy_(losses.geometric_median(batch.target))

    @property
    def unit_rows(self) -> tuple[nn.Parameter, ...]:
        """Parameters whose rows are held at unit norm.

        An optimiser that does so itself (`optimisers.Adam`) is followed by `constrain`; any other
        stands between `before_step` and `after_step`.
        """
        return (self.W_dec,) if self.unit_decoder else ()

    def before_step(self) -> None:
        """With gradients in place, before they are clipped: only what turns `unit_rows` is left."""
        if self.unit_rows:
            self.project_decoder_gradient()

    def after_step(self) -> None:
        """After the optimiser's step: unit norm for `unit_rows`, and `constrain`."""
        if self.unit_rows:
            self.normalise_decoder()
        self.constrain()

    def constrain(self) -> None:
        """Put what other constraints there are on the weights, after each step."""

    def resamples(self, state: TrainingState) -> bool:
        """Whether `resample` has anything to do after this step."""
        del state
        return False

    def resample(self, batch: TrainingBatch, state: TrainingState) -> Tensor | None:
        """Start features anew after a step; those it did, int64, or None.

        The trainer then clears the optimiser's moments of their rows.
        """
        del batch, state
        return None

    def calibrate(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        """Set inference thresholds from rows y [n, d_in] so that the mean L0 is the one asked for.

        Architectures that select within a row have nothing to set.
        """
        del rows

    def decode_normalised(self, codes: SparseCodes, y: Tensor | None = None) -> Tensor:
        """Reconstruction [batch, d_out] at the normaliser's scale; y is what was encoded."""
        del y
        own = kernels.decode(codes.row_ptr, codes.index, codes.value, self.W_dec)
        return FEATURES.sum(own) + self.b_dec

    def reconstruct(self, codes: SparseCodes, batch: TrainingBatch) -> losses.Reconstruction:
        """The batch's loss of these codes, and their reconstruction."""
        if type(self).decode_normalised is SparseAutoencoder.decode_normalised:
            return losses.reconstruct(codes, batch, self.W_dec, self.b_dec)
        return losses.Reconstruction.of(self.decode_normalised(codes, batch.y), batch)

    # ---- what everybody uses ----------------------------------------------------------------

    def encoder_input(self, y: Tensor) -> Tensor:
        """What the encoder multiplies: y - b_dec, or y without a pre-encoder bias."""
        return kernels.less(y, FEATURES.spread(self.b_dec)) if self.pre_bias else y

    def centred(self, batch: TrainingBatch) -> Tensor:
        """The encoder's input for a batch, with hidden coordinates zeroed."""
        return batch.mask_input(self.encoder_input(batch.y))

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Feature activations of x [batch, d_in], sparse, in the model's units.

        Raises InputError for rows of another width, or that are not finite.
        """
        self._check(x)
        codes = self.encode_normalised(self.normaliser.apply(x))
        return codes if self.normaliser.is_identity else codes.scale(self.normaliser.row_scale(x))

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations of x [batch, d_in], dense [batch, d_sae], in the model's units."""
        return self.encode_sparse(x).dense()

    def decode(self, codes: SparseCodes | Tensor, like: Tensor | None = None) -> Tensor:
        """Reconstruction [batch, d_out] from codes, or from dense activations [batch, d_sae].

        Args: like is the x [batch, d_in] that was encoded; skip connections and per-vector
        normalisers need it, and raise InputError without it.
        """
        if isinstance(codes, Tensor):
            if codes.shape[-1] != self.d_sae:
                raise InputError(
                    "wrong number of features",
                    where="decode",
                    given=tuple(codes.shape),
                    allowed=f"[batch, {self.d_sae}]",
                )
            codes = SparseCodes.from_dense(codes)
        y = None if like is None else self.normaliser.apply(like)
        if not self.normaliser.is_identity:
            if self.normaliser.kind == "standardised" and like is None:
                self.normaliser.invert(self.b_dec)  # says what is missing
            codes = codes.scale(
                1 / self.normaliser.row_scale(codes.value if like is None else like)
            )
        return self.normaliser_out.invert(self.decode_normalised(codes, y), like)

    def forward(self, x: Tensor) -> SAEOutput:
        """Reconstruct x [batch, d_in]."""
        codes = self.encode_sparse(x)
        return SAEOutput(self.decode(codes, like=x), codes)

    def _check(self, x: Tensor) -> None:
        if self.site_normalisers:
            raise InputError(
                "this SAE is of several sites; choose one with sae.at(site)",
                where="sae",
                allowed=self.site_normalisers,
            )
        if x.ndim != 2 or x.shape[-1] != self.d_in:
            raise InputError(
                "wrong shape of activations",
                where="sae",
                given=tuple(x.shape),
                allowed=f"[batch, {self.d_in}]",
            )
        check_rows(x, "sae")  # thresholds would take a NaN for a row on which nothing fires

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale every decoder row to unit norm."""
        norm = self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        self.W_dec.div_(norm)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from W_dec's gradient what would only change its rows' norm (unit rows)."""
        gradient = self.W_dec.grad
        if gradient is not None:
            along = (gradient * self.W_dec).sum(1, keepdim=True)
            gradient.addcmul_(self.W_dec, along, value=-1)

    # ---- units ------------------------------------------------------------------------------

    def clone(self) -> Self:
        """An independent SAE with the same weights, normaliser and metadata."""
        return copy.deepcopy(self)

    @torch.no_grad()
    def fold(self) -> Self:
        """An equal SAE whose weights are in the model's units: no mean and no scale is left.

        Same features and reconstructions, up to rounding. Only a per-vector scale
        ("standardised") cannot be folded, and stays. With y = (x - m) s, features divided by s_f:
        W_enc' = s W_enc / s_f, W_dec' = W_dec s_f / s, b_enc' = b_enc / s_f, b_dec' = m + b_dec / s
        (Gemma Scope, Lieberum et al. 2024, section 3, with a mean and a scale a site added).
        """
        folded = self.clone()
        inside, outside = self.normaliser, self.normaliser_out
        if inside.kind == "standardised" or self.site_normalisers:
            return folded  # of several sites each has its own scale: see `at`
        unit = inside.feature_scale
        for name in self.feature_units:
            if hasattr(folded, name):
                getattr(folded, name).div_(unit)
        if "W_enc_T" in folded._parameters:
            folded.W_enc_T.mul_(inside.scale / unit)
            if not self.pre_bias:
                folded.b_enc.sub_(folded.W_enc_T @ inside.mean)
        folded.W_dec.mul_(unit / outside.scale)
        folded.b_dec.copy_(outside.invert(self.b_dec))
        folded.fold_parameters(unit)
        variance = outside.variance / float(outside.scale.square().mean())
        folded.normaliser = Normaliser.identity(self.d_in, variance)
        folded.output_normaliser = None
        if self.output_normaliser is not None:
            folded.output_normaliser = Normaliser.identity(self.d_out, variance)
        return folded

    def fold_parameters(self, feature_scale: float) -> None:
        """What folding has to do beyond dividing `feature_units` (called on the folded copy)."""
        del feature_scale

    def unfold(self, inside: Normaliser, outside: Normaliser | None = None) -> Self:
        """The inverse of `fold`: an equal SAE that works at the scale of the given normalisers.

        Raises InputError for an SAE that is not folded.
        """
        if not self.normaliser.is_identity or self.site_normalisers:
            raise InputError("is not folded", where="sae.unfold", given=self.normaliser.kind)
        if inside.kind == "standardised":
            raise InputError("has no scale to unfold to", where="sae.unfold", given=inside.kind)
        ready = self.clone()
        # x = (y - m') s' with s' = 1 / s, m' = -m s: seen from y, the model's units are a scale
        ready.normaliser = _inverse(inside)
        if self.output_normaliser is not None and outside is not None:
            ready.output_normaliser = _inverse(outside)
        ready = ready.fold()
        ready.normaliser, ready.output_normaliser = inside, outside
        return ready

    def at(self, site: str) -> Self:
        """This SAE for one site, folded; several-layer SAEs have a normaliser for each.

        Raises InputError for a site it was not trained on.
        """
        if not self.site_normalisers:
            if site != self.metadata.get("site", site):
                raise InputError(
                    "this SAE is of another site",
                    where="sae.at",
                    given=site,
                    allowed=str(self.metadata["site"]),
                )
            return self
        if site not in self.site_normalisers:
            raise InputError(
                "not a site of this SAE", where="sae.at", given=site, allowed=self.site_normalisers
            )
        own = self.clone()
        own.normaliser, own.site_normalisers = self.site_normalisers[site], {}
        own.output_normaliser = None
        own.metadata["site"] = site
        return own.fold()

    # ---- on disk ----------------------------------------------------------------------------

    def save(self, folder: str | Path, *, replace: bool = False, **more: Any) -> None:
        """Write config.json and weights.safetensors into a folder, atomically.

        Keyword arguments are put into config.json beside `metadata` (measured metrics, say). With
        `replace` an SAE that is there is replaced; InputError for anything else that is.
        """
        from sae.core.serialisation import write_sae  # it imports this module

        write_sae(self, Path(folder).expanduser(), more, replace=replace)


def _inverse(normaliser: Normaliser) -> Normaliser:
    mean, scale = -normaliser.mean * normaliser.scale, 1 / normaliser.scale
    return Normaliser("centred", mean, scale, normaliser.variance)


def kind_of(config: SAEConfig) -> str:
    """The name an architecture's configuration carries."""
    return str(config.kind)  # type: ignore[attr-defined]
