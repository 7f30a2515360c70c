"""Cross-layer transcoder: features read the input of one MLP, and write to all MLPs from there.

Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models", section
"Building an interpretable replacement model":

    f^l = JumpReLU_theta(W_enc^l T y^l + b_enc^l)
    t_hat^m = sum_{l <= m} f^l W_dec^{l,m} + b_dec^m
    loss = FVU of t over all layers + lambda(t) * S + mu * pre-activation loss of dead features

y is the sites read side by side, t those written, each at its own scale
(`Normaliser.side_by_side`). S is the tanh penalty of `_jumping` with a feature's norm that of all
it writes; so is that of the loss of dead features. The paper's lambda grows over the whole run
(`l0_warmup_fraction` 1). ReLU, under the same penalty, may take the place of JumpReLU; or TopK, the
k largest of each layer's pre-activations that are positive, without a penalty:

    loss = FVU of t over all layers + 1/32 mean_l AuxK_l

AuxK_l is what the dead features of layer l make of what is left over at the sites that they write
to (Gao et al. 2024, appendix A.2).

Of L layers with F features each, of width d, the decoder has F d L (L + 1) / 2 numbers, and is kept
as L matrices: what is above the diagonal is nowhere.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sae import kernels
from sae.architectures import register
from sae.architectures._across_layers import (
    AcrossLayersConfig,
    SumOfTails,
    auxk_of_layers,
    joined,
)
from sae.architectures._jumping import Jumped, jump, penalty_of, shortfall
from sae.architectures._thresholds import threshold_for_l0
from sae.core import losses
from sae.core.base import SAEConfig, SparseAutoencoder, TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.normaliser import Normaliser
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_range

_CALIBRATION_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class CrossLayerTranscoderConfig(AcrossLayersConfig):
    """Configuration of the cross-layer transcoder."""

    kind: Literal["cross_layer_transcoder"] = "cross_layer_transcoder"
    """Name of the architecture."""


@register
class CrossLayerTranscoder(SparseAutoencoder):
    """Feature i of layer l is number l * d_sae / layers + i.

    x is the sites read, side by side [batch, layers * width], and so is what is written. W_enc_T is
    [d_sae, width read]: each row reads its own layer's site. decoders[l] is
    [d_sae / layers, (layers - l) * width written]: layer l's own site comes first.
    """

    Config: ClassVar[type[SAEConfig]] = CrossLayerTranscoderConfig
    config: CrossLayerTranscoderConfig
    concatenates: ClassVar[bool] = True
    transcodes: ClassVar[bool] = True
    pre_bias: ClassVar[bool] = False
    unit_decoder: ClassVar[bool] = False
    feature_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    full_precision: ClassVar[tuple[str, ...]] = ("threshold",)

    @property
    def penalised(self) -> bool:  # type: ignore[override]
        """With JumpReLU and ReLU, sparsity comes from a penalty."""
        return self.config.activation != "topk"

    def make_parameters(self) -> None:
        """W_enc_T, b_enc, decoders, b_dec, threshold; see the class.

        Raises InputError for widths or features that the layers cannot share equally.
        """
        self.layers = self.config.layers or 1
        for name, given in (("d_in", self.d_in), ("d_out", self.d_out), ("d_sae", self.d_sae)):
            if given % self.layers:
                raise InputError(
                    "layers are of one width",
                    where=name,
                    given=given,
                    allowed=f"a multiple of {self.layers}",
                )
        self.features_a_layer = self.d_sae // self.layers
        width = self.d_out // self.layers
        self.W_enc_T = nn.Parameter(torch.empty(self.d_sae, self.d_in // self.layers))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.decoders = nn.ParameterList(
            torch.empty(self.features_a_layer, (self.layers - layer) * width)
            for layer in range(self.layers)
        )
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        if self.config.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(self.d_sae))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Encoder rows uniform on the unit sphere; decoders and biases 0, as of transcoders."""
        nn.init.normal_(self.W_enc_T)
        self.W_enc_T.div_(self.W_enc_T.norm(dim=1, keepdim=True))
        for zero in (self.b_enc, self.b_dec, *self.decoders):
            nn.init.zeros_(zero)
        self._set_thresholds(1.0)

    @torch.no_grad()
    def start(self, batch: TrainingBatch) -> None:
        """b_dec at the mean of the targets; pre-activations of mean 0; first thresholds."""
        self.b_dec.copy_(batch.target.mean(0))
        for y, W, b in zip(
            self._by_layer(batch.y.mean(0)), *self._shares(self.W_enc_T, self.b_enc), strict=True
        ):
            b.copy_(-(W * y).sum(1))
        self._set_thresholds(self.normaliser.variance)

    def _set_thresholds(self, variance: float) -> None:
        if self.config.activation == "jumprelu":
            unit = (variance / self.d_in) ** 0.5
            self.threshold.fill_(self.config.initial_threshold * unit)

    @torch.no_grad()
    def constrain(self) -> None:
        """Thresholds do not go below 0."""
        if self.config.activation == "jumprelu":
            self.threshold.clamp_(min=0)

    # ---- layers -----------------------------------------------------------------------------

    def features_of(self, layer: int) -> slice:
        """The numbers of a layer's features; InputError for a layer that there is not."""
        check_range("layer", layer, low=0, below=self.layers)
        first = layer * self.features_a_layer
        return slice(first, first + self.features_a_layer)

    def decoder(self, layer: int) -> Tensor:
        """What a layer's features write [features, layers - layer, width], from its own site on.

        A view; InputError for a layer that there is not.
        """
        check_range("layer", layer, low=0, below=self.layers)
        return self.decoders[layer].view(self.features_a_layer, self.layers - layer, -1)

    @property
    def theta(self) -> Tensor:
        """Thresholds [d_sae], not negative; differentiable. 0 without JumpReLU."""
        if self.config.activation != "jumprelu":
            return torch.zeros_like(self.b_enc)
        return self.threshold.clamp_min(0)

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """Decoder rows over all sites [d_sae, d_out], a copy; 0 at the sites before a feature's."""
        padded = [pad(decoder, (self.d_out - decoder.shape[1], 0)) for decoder in self.decoders]
        return torch.cat(padded)

    def decoder_norms(self) -> Tensor:
        """Norm of all that each feature writes, [d_sae]; differentiable."""
        return torch.cat([losses.row_norms(decoder) for decoder in self.decoders])

    @torch.no_grad()
    def site_norms(self) -> Tensor:
        """Norm of what each feature writes at each site [d_sae, layers], 0 before its own."""
        norms = self.b_dec.new_zeros(self.d_sae, self.layers)
        for layer in range(self.layers):
            norms[self.features_of(layer), layer:] = self.decoder(layer).norm(dim=-1)
        return norms

    def feature_columns(self) -> dict[str, Tensor]:
        """Norms of encoder and decoder rows, and the encoder's bias."""
        return {
            "decoder_norm": self.decoder_norms().double(),
            "encoder_norm": self.W_enc_T.double().norm(dim=1),
            "encoder_bias": self.b_enc,
        }

    def at(self, site: str) -> Self:
        """Raises InputError: it cannot be used at one of its sites alone."""
        raise InputError(
            "a cross-layer transcoder reads all its sites at once",
            where="sae.at",
            given=site,
            allowed="no single site",
        )

    def _by_layer(self, y: Tensor) -> list[Tensor]:
        """Each layer's share of the last axis of y, contiguous."""
        return [share.contiguous() for share in y.chunk(self.layers, dim=-1)]

    def _shares(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Each layer's share of the rows of tensors [d_sae, ...]; gradients come as one."""
        return [each.unflatten(0, (self.layers, -1)).unbind(0) for each in tensors]

    # ---- codes ------------------------------------------------------------------------------

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of the sites side by side, y [batch, d_in]."""
        return joined([self.encode_layer(*each) for each in enumerate(self._by_layer(y))])

    def encode_layer(self, layer: int, y: Tensor) -> SparseCodes:
        """Codes of one layer's features, of its site alone, y [batch, width], normalised as that.

        Raises InputError for a layer that there is not.
        """
        own = self.features_of(layer)
        W, b, theta = self.W_enc_T[own], self.b_enc[own], self.theta.detach()[own]
        if self.config.activation == "topk":
            return self._largest(y, W, b)
        return SparseCodes(*kernels.encode_above(y, W, b, theta), self.features_a_layer)

    def _largest(self, y: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        """TopK of one layer: its k largest pre-activations of each row, 0 where not positive."""
        return SparseCodes.from_fixed(*kernels.encode_topk(y, W, b, self.config.k), len(W))

    def decode_normalised(self, codes: SparseCodes, y: Tensor | None = None) -> Tensor:
        """What is written to all sites, side by side [batch, d_out]."""
        del y
        layer = codes.index // self.features_a_layer
        return self._written([self._only(codes, layer == each) for each in range(self.layers)])

    def _only(self, codes: SparseCodes, chosen: Tensor) -> SparseCodes:
        found = codes.select(chosen)
        own = found.index % self.features_a_layer
        return SparseCodes(found.row_ptr, own, found.value, self.features_a_layer)

    def _written(self, *by_layer: list[SparseCodes]) -> Tensor:
        """Sum of what lists of codes, one a layer, write, and b_dec [batch, d_out]."""
        parts = [
            kernels.decode(codes.row_ptr, codes.index, codes.value, decoder)
            for several in by_layer
            for codes, decoder in zip(several, self.decoders, strict=True)
        ]
        written: Tensor = SumOfTails.apply(self.d_out, *parts)  # type: ignore[assignment]
        return written + self.b_dec

    # ---- training ---------------------------------------------------------------------------

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """FVU of all sites + lambda(t) * sparsity penalty + pre-activation loss of the dead.

        With TopK instead FVU + coefficient * AuxK.
        """
        if self.config.activation == "topk":
            return self._topk_output(batch, state)
        config, unit_in = self.config, (self.normaliser.variance / self.d_in) ** 0.5
        y, theta = self._by_layer(batch.y), self.theta
        weights = self._shares(self.W_enc_T, self.b_enc, theta)
        shares = list(zip(y, *weights, strict=True))
        eps = config.bandwidth * unit_in
        jumped = [self._jumped(own, W, b, bar, eps) for own, W, b, bar in shares]
        silent = [each.silent for each in jumped] if config.activation == "jumprelu" else None
        by_layer = [[each.codes for each in jumped], *([silent] if silent else [])]
        found = losses.Reconstruction.of(self._written(*by_layer), batch)
        (norms,) = self._shares(self.decoder_norms())
        penalty = torch.stack(
            [
                penalty_of(each, config, batch, own, self.d_in)
                for each, own in zip(jumped, norms, strict=True)
            ]
        ).sum()
        loss = found.loss + config.l0_weight(state) * penalty
        terms = {"fvu": found.loss.detach(), "sparsity": penalty.detach()}
        if config.pre_act_coefficient:
            (dead,) = self._shares(state.dead)
            short = torch.cat(
                [
                    shortfall(own, W, b, bar, each.excess, which) * norm[which]
                    for (own, W, b, bar), each, which, norm in zip(
                        shares, jumped, dead, norms, strict=True
                    )
                ]
            )
            unit_out = (batch.variance / self.d_out) ** 0.5
            lifted = batch.mean(short) / (unit_out * self.d_in)
            loss = loss + config.pre_act_coefficient * lifted
            terms["pre_act"] = lifted.detach()
        counts = torch.cat([each.codes.counts() for each in jumped])
        return TrainingOutput(loss, terms, counts, found)

    def _topk_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        y, weights = self._by_layer(batch.y), self._shares(self.W_enc_T, self.b_enc)
        shares = [(own, W, b) for own, W, b in zip(y, *weights, strict=True)]
        codes = [self._largest(*share) for share in shares]
        found = losses.Reconstruction.of(self._written(codes), batch)
        loss, terms = found.loss, {"fvu": found.loss.detach()}
        if self.config.auxk_coefficient:
            (dead,) = self._shares(state.dead)
            k_aux = self.config.k_aux or max(1, y[0].shape[1] // 2)
            auxk = auxk_of_layers(found, shares, list(self.decoders), dead, k_aux)
            loss = loss + self.config.auxk_coefficient * auxk
            terms["auxk"] = auxk.detach()
        counts = torch.cat([each.counts() for each in codes])
        return TrainingOutput(loss, terms, counts, found)

    def _jumped(self, y: Tensor, W: Tensor, b: Tensor, theta: Tensor, eps: float) -> Jumped:
        if self.config.activation == "jumprelu":
            return jump(y, W, b, theta, eps)
        codes = SparseCodes(*kernels.encode_above(y, W, b, 0.0), len(W))
        return Jumped(codes, SparseCodes.none(y, len(W)), torch.ones_like(codes.value), codes)

    @torch.no_grad()
    def calibrate(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        """Bring thresholds by one factor to where the mean L0 is `calibrated_l0`, if given."""
        target = self.config.calibrated_l0
        if self.config.activation != "jumprelu" or target is None:
            return
        theta = self.theta.clamp_min(1e-6 * float(self.theta.mean()) + 1e-30)
        shares = self._shares(self.W_enc_T, self.b_enc, 1 / theta)

        def largest(y: Tensor, n: int) -> Tensor:
            scores = [y.new_zeros(0)]
            for own, W, b, weight in zip(self._by_layer(y), *shares, strict=True):
                _, index, value = kernels.encode_top_of_batch(own, W, b, n, weight=weight)
                scores.append(value * weight[index])
            every = torch.cat(scores)
            return every.topk(min(n, len(every))).values

        def chunks() -> Iterable[tuple[int, Callable[[int], Tensor]]]:
            for y in rows():
                for some in y.split(_CALIBRATION_ROWS):
                    yield len(some), partial(largest, some)

        self.threshold.copy_(theta * threshold_for_l0(chunks, target))

    # ---- folding ----------------------------------------------------------------------------

    def fold_encoder(self, inside: Normaliser, unit: float) -> None:
        """Each layer's rows read a site at that site's own scale and mean."""
        scale = inside.scale.expand(self.d_in)
        shares = self._shares(self.W_enc_T, self.b_enc)
        each = zip(self._by_layer(scale), self._by_layer(inside.mean), *shares, strict=True)
        for own_scale, own_mean, W, b in each:
            W.mul_(own_scale / unit)
            b.sub_(W @ own_mean)

    def fold_decoder(self, outside: Normaliser, unit: float) -> None:
        """Each layer's rows write the sites from its own on."""
        scale = outside.scale.expand(self.d_out)
        for decoder in self.decoders:
            decoder.mul_(unit / scale[self.d_out - decoder.shape[1] :])
