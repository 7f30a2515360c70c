"""How many bits an SAE's codes take: a dictionary is good if activations are said briefly with it.

Sender and receiver share the decoder; the code of a row is sent (Ayonrinde, Pearce and Sharkey
2024, MDL-SAE, section 3). Bits are the cross-entropy, on held-out rows, of a distribution that was
fitted on training rows, which an arithmetic coder reaches:

    index  sum_j of -log2 p_j where feature j fires, -log2 (1 - p_j) where it does not
    value  sum over active features j of -log2 q_j(symbol)

p_j is j's rate, (n_j + 1/2) / (N + 1). A value is quantised by one step for all features, in units
of what it adds to the reconstruction, f_j ||W_dec,j||; q_j is j's own histogram of symbols, mixed
with that of all features as if that had been seen 16 times. The step is the largest of a grid with
which FVU on the training rows rises by no more than 0.001. On held-out rows the rise is measured
again; where it is more than twice that, there is no result.

The dictionary is sent once: `dictionary_bits` says what that costs, at 32 bits a number.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.distributed import ROWS
from sae.evaluation import metric_family
from sae.evaluation.intervals import ratio
from sae.evaluation.rows import Coder, Counted, EncodedRows, RowSums, Setting
from sae.kernels.codes import SparseCodes
from saescope.metrics import Metric

TRAINING_ROWS, QUICK_TRAINING_ROWS = 16_384, 4096
TOLERANCE = 1e-3
"""by how much FVU may rise when values are quantised"""
PRIOR = 16.0
"""weight of all features' histogram of symbols in each one's, in observations"""
_STEPS = tuple(2.0 ** (1 - n / 2) for n in range(24))
"""steps that are tried, over the root mean square of contributions, largest first"""
_SYMBOLS = 1 << 20
"""symbols are cut off at half of this, either side of 0"""
_FLOAT_BITS = 32
_FAR = "quantising the values changes FVU by more than is allowed"


def _row(name: str, label: str, what: str, **more: Any) -> Metric:
    return Metric(
        name=name,
        label=label,
        unit="bits a row",
        form=".1f",
        help=what,
        source="Ayonrinde et al. 2024 (MDL-SAE), section 3",
        undefined=_FAR,
        **more,
    )


DESCRIPTION_BITS = _row(
    "description_bits",
    "description length",
    "Bits of a row's code under a distribution fitted on training rows. Compare at equal FVU only.",
    better="lower",
    interval=True,
)
INDEX_BITS = _row(
    "index_bits",
    "index bits",
    "The part of them that says which features fire.",
    better="neither",
    interval=True,
)
VALUE_BITS = _row(
    "value_bits",
    "value bits",
    "The part of them that says how strongly.",
    better="neither",
    interval=True,
)
FVU_QUANTISED = Metric(
    name="fvu_quantised",
    label="FVU quantised",
    better="lower",
    help="FVU of the reconstructions from the values that are sent: the distortion at this length.",
    interval=True,
)


class CodeDistribution:
    """A distribution of codes: which features fire, and of which symbol their values are."""

    def __init__(self, d_sae: int, norms: Tensor, step: float) -> None:
        self.d_sae, self.norms, self.step = d_sae, norms.double().cpu().clamp_min(1e-30), step
        self.rows = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self.pairs = torch.zeros(0, dtype=torch.int64)
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.low, self.shared = 0, torch.ones(1, dtype=torch.float64)

    # ---- values and symbols -------------------------------------------------------------------

    def symbols(self, codes: SparseCodes) -> Tensor:
        """The symbol int64 [entries] of each value: its contribution in steps, to the nearest."""
        contribution = codes.value.double().cpu() * self.norms[codes.index.cpu()]
        half = _SYMBOLS // 2
        return (contribution / self.step).round().clamp(-half, half - 1).long()

    def quantised(self, codes: SparseCodes) -> SparseCodes:
        """The codes that the receiver has."""
        value = self.symbols(codes) * self.step / self.norms[codes.index.cpu()]
        return SparseCodes(codes.row_ptr, codes.index, value.to(codes.value), codes.d_sae)

    # ---- fitting ------------------------------------------------------------------------------

    def count(self, codes: SparseCodes) -> None:
        """Count the codes of some training rows."""
        self.rows += codes.batch
        self.fired += torch.bincount(codes.index.cpu(), minlength=self.d_sae)
        key = codes.index.cpu() * _SYMBOLS + self.symbols(codes) + _SYMBOLS // 2
        own, number = key.unique(return_counts=True)
        self._merge(torch.cat([self.pairs, own]), torch.cat([self.counts, number]))

    def _merge(self, pairs: Tensor, counts: Tensor) -> None:
        self.pairs, inverse = pairs.unique(return_inverse=True)
        self.counts = torch.zeros_like(self.pairs).index_add(0, inverse, counts)

    def finish(self) -> None:
        """Take in what other ranks have counted, and make probabilities of it."""
        self.rows, self.fired = ROWS.total(self.rows), ROWS.sum(self.fired)
        self._merge(ROWS.gather(self.pairs), ROWS.gather(self.counts))
        symbol = self.pairs % _SYMBOLS
        if len(symbol):
            self.low = int(symbol.min())
        found = torch.zeros(int(symbol.max()) - self.low + 1 if len(symbol) else 1)
        shared = found.double().index_add(0, symbol - self.low, self.counts.double()) + 0.5
        self.shared = shared / shared.sum()

    # ---- probabilities ------------------------------------------------------------------------

    @property
    def rate(self) -> Tensor:
        """float64 [d_sae], the probability that each feature fires."""
        return (self.fired.double() + 0.5) / (self.rows + 1)

    def number(self, symbols: Tensor) -> Tensor:
        """Number of each symbol in the alphabet that training rows have; cut off at its ends."""
        return (symbols + _SYMBOLS // 2 - self.low).clamp(0, len(self.shared) - 1)

    def value_probability(self, feature: Tensor, symbols: Tensor) -> Tensor:
        """Probability float64 [n] of symbols int64 [n] as features' values."""
        own = self.number(symbols)
        key = feature * _SYMBOLS + own + self.low
        seen = torch.zeros(len(key), dtype=torch.float64)
        if len(self.pairs):
            at = torch.searchsorted(self.pairs, key).clamp_max(len(self.pairs) - 1)
            seen = torch.where(self.pairs[at] == key, self.counts[at], 0).double()
        return (seen + PRIOR * self.shared[own]) / (self.fired[feature].double() + PRIOR)

    def bits(self, codes: SparseCodes) -> Tensor:
        """Index and value bits of each row, float64 [rows, 2]."""
        rate, feature = self.rate, codes.index.cpu()
        row = torch.repeat_interleave(torch.arange(codes.batch), codes.l0().cpu())
        index = ((1 - rate[feature]) / rate[feature]).log2()
        value = -self.value_probability(feature, self.symbols(codes)).log2()
        silent = -(1 - rate).log2().sum()
        found = torch.zeros(codes.batch, 2, dtype=torch.float64)
        found[:, 0] = silent
        return found.index_add(0, row, torch.stack([index, value], dim=1))


@dataclass(frozen=True)
class _Errors:
    """Squared errors of reconstructions, and squared deviations from the mean, summed."""

    error: Tensor
    """float64 [n]"""
    deviation: float

    @property
    def fvu(self) -> Tensor:
        """float64 [n]"""
        return self.error / max(self.deviation, 1e-300)


@metric_family(
    "description_length",
    needs="activations",
    metrics=(DESCRIPTION_BITS, INDEX_BITS, VALUE_BITS, FVU_QUANTISED),
    protocol={"training_rows": TRAINING_ROWS, "tolerance": TOLERANCE, "prior": PRIOR},
    quick={"training_rows": QUICK_TRAINING_ROWS},
    suite="description_length",
)
class DescriptionLength(RowSums):
    """Bits of held-out rows' codes and squared errors, five float64 a row."""

    readings: ClassVar[int] = 3

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.training_rows = QUICK_TRAINING_ROWS if setting.quick else TRAINING_ROWS
        self.distribution = CodeDistribution(setting.d_sae, self._norms(), 1.0)
        self.rows = [torch.zeros(0, 5, dtype=torch.float64)]

    def _norms(self) -> Tensor:
        sae = self.setting.sae
        if isinstance(sae, SparseAutoencoder):
            return sae.decoder_directions().detach().norm(dim=1)
        return torch.ones(self.setting.d_sae)

    def fit(self, training: Callable[[], Iterator[EncodedRows]]) -> None:
        """Choose the step, then count features and symbols: three readings of the rows."""
        norms = self.distribution.norms
        square, entries = 0.0, 0
        for rows in training():
            own = rows.codes.value.double().cpu() * norms[rows.codes.index.cpu()]
            square, entries = square + float(own.square().sum()), entries + len(own)
        found = ROWS.sum(torch.tensor([square, float(entries)], dtype=torch.float64)).tolist()
        scale = (found[0] / found[1]) ** 0.5 if found[0] else 1.0
        self.distribution = self._with_step(training, scale)
        for rows in training():
            self.distribution.count(rows.codes)
        self.distribution.finish()

    def _with_step(
        self, training: Callable[[], Iterator[EncodedRows]], scale: float
    ) -> CodeDistribution:
        norms, d_sae = self.distribution.norms, self.setting.d_sae
        tried = [CodeDistribution(d_sae, norms, scale * step) for step in _STEPS]
        error = torch.zeros(len(tried) + 1, dtype=torch.float64)
        deviation = 0.0
        for rows in training():
            received = [rows.x_hat, *(self._received(each, rows) for each in tried)]
            error += torch.stack([(rows.target - x_hat).square().sum().cpu() for x_hat in received])
            deviation += float((rows.target - self.setting.mean).square().sum())
        total = float(ROWS.sum(torch.tensor(deviation, dtype=torch.float64)))
        fvu = _Errors(ROWS.sum(error), total).fvu
        within = [
            each for each, one in zip(tried, fvu[1:], strict=True) if one <= fvu[0] + TOLERANCE
        ]
        return within[0] if within else tried[-1]

    def _received(self, distribution: CodeDistribution, rows: EncodedRows) -> Tensor:
        """What the receiver reconstructs, float64 [rows, d_out]."""
        sae: Coder | None = self.setting.sae
        assert sae is not None
        return sae.decode(distribution.quantised(rows.codes), like=rows.given.x).double()

    def add(self, rows: EncodedRows) -> None:
        """Add some held-out rows."""
        errors = [
            (rows.target - other).square().sum(1, keepdim=True).cpu()
            for other in (rows.x_hat, self._received(self.distribution, rows), self.setting.mean)
        ]
        self.rows.append(torch.cat([self.distribution.bits(rows.codes), *errors], dim=1))

    def values(self, counted: Counted) -> dict[str, Any]:
        """The metrics; bits are None where quantising changed FVU too much."""
        columns = ROWS.gather(torch.cat(self.rows))
        index, value, error, quantised, deviation = columns.unbind(1)
        document = None if counted.document is None else counted.document.cpu()
        ones = torch.ones_like(index)
        fvu, fvu_interval = ratio(quantised, deviation, document)
        rise = float((quantised - error).sum() / deviation.sum()) if fvu is not None else 0.0
        bits = {
            "description_bits": index + value,
            "index_bits": index,
            "value_bits": value,
        }
        found: dict[str, Any] = {}
        for name, each in bits.items():
            both = ratio(each, ones, document) if rise <= 2 * TOLERANCE else (None, None)
            found[name], found[f"{name}_interval"] = both
        return {
            **found,
            "fvu_quantised": fvu,
            "fvu_quantised_interval": fvu_interval,
            "quantiser_step": self.distribution.step,
            "dictionary_bits": _FLOAT_BITS * (self.setting.d_sae + 1) * len(self.setting.mean),
        }
