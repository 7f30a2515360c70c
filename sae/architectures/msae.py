"""MSAE: nested TopK levels on one encoder (Zaigrajew et al. 2025, arXiv 2502.20578).

pre = W_enc^T (y - b_dec) + b_enc;   for levels k_1 < ... < k_n:
z_i = ReLU(TopK_{k_i}(pre)),   y_hat_i = z_i W_dec + b_dec
loss = sum_i alpha_i FVU(y_hat_i) / sum_i alpha_i + 1/32 AuxK
alpha = 1, ..., 1 (uniform) or n, n-1, ..., 1 (reverse: the sparsest level weighs most).

One selection of the largest level serves all: its entries are sorted, a level is a prefix of them,
and a level's reconstruction is the one before it plus the entries that are new. Where the paper
encodes with every positive pre-activation unless a k is given, this SAE has one level that it is
used and measured at, `k`, so that L0 and FVU are of the same codes; `at_k` gives it at another.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from sae import kernels
from sae.architectures import register
from sae.architectures._auxk import AuxKConfig, AuxKSAE
from sae.architectures._nested import nested
from sae.core.base import SAEConfig, TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.plain import Rule
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_choice


@dataclass(frozen=True, kw_only=True)
class MSAEConfig(AuxKConfig):
    """Configuration of the nested TopK architecture."""

    k: int = 32
    """Features kept a token (L0): the level used after training."""
    kind: Literal["msae"] = "msae"
    """Name of the architecture."""
    ks: tuple[int, ...] = ()
    """Levels trained, rising; if not given, k/4, k/2, k, 2k and 4k, as far as the dictionary goes.
    A step costs as much as a TopK step at the largest."""
    weighting: Literal["uniform", "reverse"] = "uniform"
    """Weights of the levels: equal, or n, n-1, ..., 1 with the sparsest level heaviest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_k("k", self.k)
        for level in self.ks:
            self.check_k("ks", level)
        if any(low >= high for low, high in zip(self.ks, self.ks[1:], strict=False)):
            raise InputError("levels must rise", where="sae.ks", given=self.ks)
        check_choice("no such weighting", "sae.weighting", self.weighting, ("uniform", "reverse"))

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels trained, rising."""
        if self.ks:
            return self.ks
        around = {self.k // 4, self.k // 2, self.k, 2 * self.k, 4 * self.k}
        return tuple(sorted({min(max(level, 1), self.d_sae) for level in around}))

    @property
    def weights(self) -> tuple[float, ...]:
        """alpha_i of each level over their sum.

        >>> MSAEConfig(ks=(8, 16, 32), weighting="reverse").weights
        (0.5, 0.3333333333333333, 0.16666666666666666)
        """
        n = len(self.levels)
        alpha = [1] * n if self.weighting == "uniform" else list(range(n, 0, -1))
        return tuple(each / sum(alpha) for each in alpha)


@register
class MSAE(AuxKSAE):
    """One TopK SAE that is trained at several k at once."""

    Config: ClassVar[type[SAEConfig]] = MSAEConfig
    config: MSAEConfig
    plain_rules: ClassVar[tuple[Rule, ...]] = ("topk",)

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in] at level k."""
        index, value = kernels.encode_topk(
            self.encoder_input(y), self.W_enc_T, self.b_enc, self.config.k
        )
        return SparseCodes.from_fixed(index, value, self.d_sae)

    def plain_parts(self) -> dict[str, Any]:
        """TopK's rule at level k."""
        return {"activation": "topk", "k": self.config.k, "b_enc": self.b_enc}

    def at_k(self, k: int) -> Self:
        """The same SAE used at level k; k = d_sae keeps every positive pre-activation.

        Raises InputError for a k that the dictionary has not got.
        """
        ks = self.config.levels
        other = self.clone()
        other.config = replace(self.config, k=k, ks=ks)
        return other

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """Weighted FVU of the levels + coefficient * AuxK; "fvu" is level k's."""
        config = self.config
        centred = self.centred(batch)
        levels = sorted({*config.levels, config.k})
        index, value = kernels.encode_topk(centred, self.W_enc_T, self.b_enc, levels[-1])
        value, order = value.sort(dim=1, descending=True, stable=True)
        index = index.gather(1, order)
        added = [
            SparseCodes.from_fixed(index[:, below:k], value[:, below:k], self.d_sae)
            for below, k in pairwise([0, *levels])
        ]
        at = dict(zip(levels, nested(added, batch, self.W_dec, self.b_dec)[1:], strict=True))
        loss = torch.stack(
            [w * at[k].loss for k, w in zip(config.levels, config.weights, strict=True)]
        ).sum()
        terms = {"fvu": at[config.k].loss.detach()}
        terms |= {f"fvu_{k}": at[k].loss.detach() for k in config.levels}
        loss = self.add_auxk(loss, terms, centred, at[config.k], state)
        fired = index[:, : config.k][value[:, : config.k] > 0]
        counts = torch.bincount(fired, minlength=self.d_sae)
        return TrainingOutput(loss, terms, counts, at[config.k])
