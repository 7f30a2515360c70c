"""What every sparse autoencoder is: parameters, encode, decode, forward, fold, save.

Units. Everything public (x, activations, x_hat) is in the model's own units; inside, an SAE works
at the scale of its normaliser. With y = (x - m) s and a positively homogeneous activation function
the two agree: f = f_y / s and x_hat = f W_dec + (m + b_dec / s). A released SAE is folded: its
weights are in the model's units themselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sae import kernels
from sae.core import losses
from sae.core.batch import TrainingBatch
from sae.core.config import SAEConfig, kind_of
from sae.core.finite import check_rows
from sae.core.outputs import SAEOutput, TrainingOutput, TrainingState
from sae.core.plain import PlainSAE, Rule
from sae.core.scaled import ScaledModule
from sae.core.serialisation import SavedSAE, write_saved
from sae.distributed import FEATURES, normal_rows_
from sae.kernels.codes import SparseCodes
from saescope.config import to_dict
from saescope.errors import InputError, check_range
from saescope.integers import as_index

_ARCHITECTURES = "sae.architectures."
"""modules of the architectures that come with saescope"""


class SparseAutoencoder(ScaledModule, ABC):
    """A sparse autoencoder; a subclass is one architecture in one file of `sae/architectures/`.

    W_enc_T and W_dec are both kept one feature a row, [d_sae, d_in] and [d_sae, d_out], as the
    sparse kernels read them. d_out is d_in but for transcoders.
    """

    Config: ClassVar[type[SAEConfig]]
    penalised: ClassVar[bool] = False
    """sparsity comes from a penalty: the trainer can steer L0 through `TrainingState.penalty`"""
    signed: ClassVar[bool] = False
    """activations may be negative"""
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
    full_precision: ClassVar[tuple[str, ...]] = ()
    """parameters and buffers that do not go below float32 when the module is cast"""
    plain_rules: ClassVar[tuple[Rule, ...]] = ()
    """selection rules by which other libraries' formats can hold it, as `plain_parts` states them;
    none: only saescope's own format holds it"""

    def __init__(self, config: SAEConfig, d_in: int, d_out: int | None = None) -> None:
        d_in = as_index(d_in, where="d_in", low=1)
        super().__init__(d_in, d_in if d_out is None else as_index(d_out, where="d_out", low=1))
        self.config = config
        self.d_sae = self._own_features()
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
        """The loss of a batch, at the normaliser's scale, and its terms."""

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

    def plain_parts(self) -> dict[str, Any]:
        """Fields of `PlainSAE` beside W_enc, W_dec, b_dec and pre_bias, of one of `plain_rules`.

        Called on a folded copy; may overrule those four. Raises InputError for a configuration
        that no such rule describes.
        """
        raise InputError(
            "other libraries have no rule for it", where="sae", given=kind_of(self.config)
        )

    def decoder_directions(self) -> Tensor:
        """What each feature writes [d_sae, d_out], as cosines between features are to count it."""
        return self.W_dec

    def encoder_bias(self) -> Tensor | None:
        """The bias [d_sae] that pre-activations have; None where there is no single one."""
        return self.b_enc

    def feature_columns(self) -> dict[str, Tensor]:
        """What the weights alone say of each feature, [d_sae] each, by the store's column.

        Norms, the encoder's bias and, where both are of one space, the cosine of encoder and
        decoder.
        """
        encoder, decoder = self.W_enc_T.double(), self.W_dec.double()
        columns = {"decoder_norm": decoder.norm(dim=1), "encoder_norm": encoder.norm(dim=1)}
        if not self.transcodes:
            product = (columns["encoder_norm"] * columns["decoder_norm"]).clamp_min(1e-30)
            columns["encoder_decoder_cosine"] = (encoder * decoder).sum(1) / product
        bias = self.encoder_bias()
        return columns if bias is None else {**columns, "encoder_bias": bias}

    def decode_normalised(self, codes: SparseCodes, y: Tensor | None = None) -> Tensor:
        """Reconstruction [batch, d_out] at the normaliser's scale; y is what was encoded."""
        del y
        own = kernels.decode(codes.row_ptr, codes.index, codes.value, self.W_dec)
        return FEATURES.sum(own) + self.b_dec

    def reconstruct(
        self, codes: SparseCodes, batch: TrainingBatch, silent: SparseCodes | None = None
    ) -> losses.Reconstruction:
        """The batch's loss of these codes, and their reconstruction.

        silent: further entries, whose values are 0 but have a gradient (`losses.reconstruct`).
        """
        if type(self).decode_normalised is SparseAutoencoder.decode_normalised:
            return losses.reconstruct(codes, batch, self.W_dec, self.b_dec, silent)
        y_hat = self.decode_normalised(codes, batch.y)
        if silent is not None:
            row_ptr, index, value = silent.row_ptr, silent.index, silent.value
            y_hat = y_hat + FEATURES.sum(kernels.decode(row_ptr, index, value, self.W_dec))
        return losses.Reconstruction.of(y_hat, batch)

    # ---- what everybody uses ----------------------------------------------------------------

    def encoder_input(self, y: Tensor) -> Tensor:
        """What the encoder multiplies: y - b_dec, or y without a pre-encoder bias."""
        return kernels.subtract_bias(y, FEATURES.spread(self.b_dec)) if self.pre_bias else y

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

    # ---- elsewhere ----------------------------------------------------------------------------

    def save(self, folder: str | Path, *, replace: bool = False, **more: Any) -> None:
        """Write config.json and weights.safetensors into a folder, atomically.

        Keyword arguments are put into config.json beside `metadata` (measured metrics, say). With
        `replace` an SAE that is there is replaced; InputError for anything else that is.
        """
        write_saved(self.saved(), Path(folder).expanduser(), more, replace=replace)

    @torch.no_grad()
    def plain(self) -> PlainSAE:
        """This SAE, folded, as weights and a selection rule that other libraries know.

        Raises InputError for an architecture or a configuration that no such rule describes.
        """
        folded = self.fold()
        common = {
            "W_enc": folded.W_enc,
            "W_dec": folded.W_dec,
            "b_dec": folded.b_dec,
            "pre_bias": folded.pre_bias,
            "standardised": folded.normaliser.kind == "standardised",
        }
        return PlainSAE.of(**{**common, **folded.plain_parts()})

    def saved(self) -> SavedSAE:
        """What a folder of this SAE holds; its tensors are these, not copies."""
        module = type(self).__module__
        return SavedSAE(
            architecture=kind_of(self.config),
            defined_in=None if module.startswith(_ARCHITECTURES) else module,
            config=to_dict(self.config),
            d_in=self.d_in,
            d_out=self.d_out,
            tensors=self.state_dict(),
            normalisers=self.normalisers,
            metadata=self.metadata,
        )
