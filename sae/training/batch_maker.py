"""Training batches: the rows that a stream gives, as an architecture's loss takes them.

Rows are brought to the normaliser's scale (of several layers, each to its own); the changes to the
loss that any architecture can take, tilt and hidden coordinates, are put in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae.core.base import SparseAutoencoder, kind_of
from sae.core.batch import RawBatch, TrainingBatch
from saescope.config import Config
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    """Changes to the reconstruction loss that every architecture can take."""

    tilt: float = 0.0
    """t of the tilted empirical risk (1/t) log mean exp(t l), with l a row's error in units of the
    data's variance; 0 is the plain mean, larger cares more for the worst rows (SSAE)."""
    visible_fraction: float = 1.0
    """Fraction of the coordinates that the encoder sees, drawn anew each batch; below 1 the loss is
    on the hidden ones (masked reconstruction, Chidambaram et al. 2023)."""

    def __post_init__(self) -> None:
        check_range("trainer.loss.tilt", self.tilt, low=0)
        check_range("trainer.loss.visible_fraction", self.visible_fraction, above=0, high=1)


class BatchMaker:
    """Makes training batches for one SAE.

    Raises InputError if masking is asked of a transcoder, or of too narrow activations.
    """

    def __init__(self, sae: SparseAutoencoder, config: LossConfig) -> None:
        self.sae, self.config = sae, config
        self._sites = list(sae.site_normalisers.values())
        self._variances = torch.tensor([site.variance for site in self._sites])
        self._n_visible = round(config.visible_fraction * sae.d_in)
        if config.visible_fraction < 1:
            if sae.output_normaliser is not None:
                raise InputError(
                    "a transcoder reads another site than it writes: nothing to hide",
                    where="trainer.loss.visible_fraction",
                    given=config.visible_fraction,
                    allowed="1",
                )
            check_range("trainer.loss: visible coordinates", self._n_visible, low=1, below=sae.d_in)

    def make(self, raw: RawBatch, generator: torch.Generator) -> TrainingBatch:
        """Rows in the model's units to a batch at the normaliser's scale."""
        sae = self.sae
        y = self.normalised(raw)
        target, variance = y, sae.normaliser.variance
        if raw.target is not None:
            target, variance = sae.normaliser_out.apply(raw.target), sae.normaliser_out.variance
        visible = None
        if self.config.visible_fraction < 1:
            order = torch.randperm(sae.d_in, generator=generator)
            visible = torch.zeros(sae.d_in, dtype=torch.bool)
            visible[order[: self._n_visible]] = True
            visible = visible.to(y.device)
        grouped = raw.group is not None and bool(self._sites)
        return TrainingBatch(
            y=y,
            target=target,
            variance=float(self._variances.mean()) if grouped else variance,
            group=raw.group if grouped else None,
            group_variance=self._variances.to(y) if grouped else None,
            visible=visible,
            labels=raw.labels,
            tilt=self.config.tilt,
        )

    def normalised(self, raw: RawBatch) -> Tensor:
        """What is encoded, [batch, d_in], at the normaliser's scale (its layer's, if several)."""
        if raw.group is None or not self._sites:
            return self.sae.normaliser.apply(raw.x)
        y = torch.empty_like(raw.x)
        for number, site in enumerate(self._sites):
            rows = raw.group == number
            y[rows] = site.apply(raw.x[rows])
        return y


def check_first_rows(sae: SparseAutoencoder, batch_size: int, accumulate: int) -> None:
    """Raise InputError if the first micro-batch is too small to initialise an SAE from."""
    first = -(-batch_size // accumulate)
    if first < sae.first_rows:
        raise InputError(
            f"{kind_of(sae.config)} takes more rows than that from its first batch",
            where="trainer.batch_size",
            given=f"{first} in the first of {accumulate} micro-batches",
            allowed=f"at least {sae.first_rows} in each",
        )
