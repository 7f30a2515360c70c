"""Certificates: an SAE measured on reference activations against what it is said to measure.

A file's numbers load into the wrong function without any error: a bias subtracted or not, a
threshold lost, a scale that was never folded in. Then L0 and FVU are far from those released, and
reading the same weights another way brings them back: that is tried, and named in the error.

Tolerances, since a reference is other text than the SAE was released on: L0 within 25 % and FVU
within 0.05, each with three standard errors of the measurement besides; cross-entropy recovered
within 0.05. An FVU of 1 or more, which predicting the mean also gives, is a mismatch too; but where
no FVU is claimed, an L0 that is no setting of the architecture is as claimed, and no other reading
of the weights does better, it is the weights that are poor, and a warning says so. An SAE whose FVU
falls by a quarter or more when b_dec is subtracted from the input, or is not, without a rise of L0
beyond its tolerance, is a mismatch as well.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.evaluation.intervals import half_width
from sae.evaluation.reconstruction import FvuSums
from sae.evaluation.rows import Coder, Piece, encoded
from sae.formats._claim import Claim
from sae.formats.misreadings import readings
from saescope.errors import ArtefactError, InputError
from saescope.metrics import metric
from saescope.progress import say

if TYPE_CHECKING:
    from activations import Model

L0_TOLERANCE = 0.25
FVU_TOLERANCE = 0.05
CE_TOLERANCE = 0.05
BETTER = 0.75
"""factor on FVU that another treatment of b_dec must reach to cast doubt on an SAE in line"""
_L0, _FVU, _RECOVERED = metric("l0"), metric("fvu"), metric("recovered_zero")
_ROWS = 1024
_TRIAL_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Measured:
    """On reference rows; an interval is half of a 95 % one, rows as independent."""

    rows: int
    """number of rows"""
    l0: float
    """mean number of features active"""
    l0_interval: float
    """half width of its interval"""
    fvu: float | None
    """fraction of variance unexplained; None for a transcoder without targets"""
    fvu_interval: float
    """half width of its interval"""

    def text(self) -> str:
        """The numbers in words: L0, and FVU where it was measured."""
        return _L0.text(self.l0) + ("" if self.fvu is None else f", {_FVU.text(self.fvu)}")


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """That an SAE measures what is claimed, within the tolerances of `sae.formats.certificate`."""

    measured: Measured
    """on the reference"""
    ce_recovered: float | None
    """cross-entropy recovered against zero-ablation, where a model was given"""
    claimed: Claim | None
    """what was compared with; None if nothing is claimed"""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@torch.no_grad()
def certify(
    sae: SparseAutoencoder,
    reference: Tensor,
    *,
    claimed: Claim | Mapping[str, Any] | None = None,
    target: Tensor | None = None,
    model: "Model | None" = None,
    tokens: Tensor | None = None,
    where: str = "sae",
) -> Certificate:
    """Measure an SAE on reference activations and compare with what is claimed.

    Args:
        reference: rows [n, d_in] of the site the SAE is for, in the model's units; some thousands.
        claimed: l0, fvu, ce_recovered, any of them.
        target: rows [n, d_out] that a transcoder is to predict.
        model, tokens: a model and sequences int64 [n, position], to measure CE recovered at the
            SAE's site.
        where: the SAE's name, for errors.

    Raises ArtefactError, naming the way of reading the weights that would bring the numbers in
    line, if they are not; InputError if the reference does not fit.
    """
    _check_reference(sae, reference, target)
    claim = None if claimed is None else Claim.of(claimed)
    y = target if sae.transcodes else reference
    measured = measure(sae, reference, y)
    differing = differences(measured, claim)
    if differing:
        fitting = _fitting(sae, reference, y, measured, claim)
        text = _explain(measured, claim, differing, fitting)
        if fitting or not _only_poor(sae, measured, claim):
            raise ArtefactError(text, where=where)
        say(f"warning: {where}: {text}")
    doubt = _doubt(sae, reference, y, measured)
    if doubt:
        raise ArtefactError(doubt, where=where)
    ce = None
    if model is not None:
        ce = _ce_recovered(sae, y, model, tokens)
        _check_ce(ce, claim, where)
    return Certificate(measured=measured, ce_recovered=ce, claimed=claim)


def _check_ce(recovered: float | None, claim: Claim | None, where: str) -> None:
    if recovered is None or claim is None or claim.ce_recovered is None:
        return
    if abs(recovered - claim.ce_recovered) > CE_TOLERANCE:
        raise ArtefactError(
            f"recovers {_RECOVERED.shown(recovered)} of the cross-entropy, not "
            f"{_RECOVERED.shown(claim.ce_recovered)} as claimed by {claim.source}, though "
            f"{_L0.label} and {_FVU.label} are in line: the model or the site is not the SAE's, "
            "or other positions were counted",
            where=where,
        )


def _check_reference(sae: SparseAutoencoder, reference: Tensor, target: Tensor | None) -> None:
    if reference.ndim != 2 or reference.shape[1] != sae.d_in or len(reference) < 2:
        raise InputError(
            "wrong shape",
            where="reference",
            given=tuple(reference.shape),
            allowed=f"[rows, {sae.d_in}]",
        )
    if target is not None and target.shape != (len(reference), sae.d_out):
        raise InputError(
            "wrong shape",
            where="target",
            given=tuple(target.shape),
            allowed=f"[{len(reference)}, {sae.d_out}]",
        )


@torch.no_grad()
def measure(sae: Coder, x: Tensor, target: Tensor | None) -> Measured:
    """L0, and FVU against target [n, d_out] (None: not measured), on rows x [n, d_in]."""
    counts = []
    squares = None if target is None else FvuSums(target.double().mean(0))
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        if target is None or squares is None:
            counts.append(sae.encode_sparse(x[rows].float()).l0().double())
            continue
        found = encoded(sae, Piece(x[rows].float(), target[rows]))
        counts.append(found.codes.l0().double())
        squares.add(found.target, found.x_hat)
    l0 = torch.cat(counts)
    fvu, interval = (None, None) if squares is None else squares.fvu(where="reference")
    return Measured(
        rows=len(x),
        l0=float(l0.mean()),
        l0_interval=half_width(l0, torch.ones_like(l0)) or 0.0,
        fvu=fvu,
        fvu_interval=interval or 0.0,
    )


def differences(measured: Measured, claim: Claim | None) -> list[str]:
    """What is out of line, in words."""
    found = []
    noise = 3 / 1.96
    if claim and claim.l0 is not None:
        allowed = L0_TOLERANCE * claim.l0 + noise * measured.l0_interval
        if abs(measured.l0 - claim.l0) > allowed:
            found.append(f"{_L0.text(measured.l0)}, not {claim.l0:g}")
    if measured.fvu is None:
        return found
    if claim and claim.fvu is not None:
        allowed = FVU_TOLERANCE + noise * measured.fvu_interval
        if not abs(measured.fvu - claim.fvu) <= allowed:
            found.append(f"{_FVU.text(measured.fvu)}, not {claim.fvu:g}")
            return found
    if not measured.fvu < 1:
        found.append(f"{_FVU.text(measured.fvu)}, no better than predicting the mean")
    return found


def _only_poor(sae: SparseAutoencoder, measured: Measured, claim: Claim | None) -> bool:
    """Whether an FVU of 1 or more is all that speaks against an SAE, and its L0 speaks for it."""
    if claim is None or claim.l0 is None or claim.fvu is not None or sae.config.has_k:
        return False
    return not differences(replace(measured, fvu=None), claim)


def _fitting(
    sae: SparseAutoencoder,
    reference: Tensor,
    target: Tensor | None,
    measured: Measured,
    claim: Claim | None,
) -> list[tuple[bool, float, str, Measured]]:
    """Readings that bring the numbers in line: (fitted to them, FVU, what is wrong, numbers)."""
    x = reference[:_TRIAL_ROWS]
    y = None if target is None else target[:_TRIAL_ROWS]
    fitting = []
    for reading in readings(sae, x, claim):
        trial = measure(reading.sae, x, y)
        # fitted to the claimed L0, a reading proves nothing by it: only a lower FVU speaks for it
        better = measured.fvu is None or (trial.fvu is not None and trial.fvu < 0.95 * measured.fvu)
        in_line = not differences(trial, claim)
        if in_line and (better or not reading.fitted or _fvu_claimed(claim)):
            fitting.append((reading.fitted, trial.fvu or 0.0, reading.wrong, trial))
    return fitting


def _explain(
    measured: Measured,
    claim: Claim | None,
    differing: list[str],
    fitting: list[tuple[bool, float, str, Measured]],
) -> str:
    source = f" as claimed by {claim.source}" if claim and claim.stated() else ""
    text = f"on {measured.rows:,} reference rows it has {' and '.join(differing)}{source}; "
    if not fitting:
        return (
            f"{text}no other way of reading its weights that was tried brings this in line: are "
            "the reference activations of the SAE's model and site, in the model's own units, "
            "without position 0 and special tokens?"
        )
    _, _, wrong, trial = min(fitting, key=lambda each: each[:2])
    return f"{text}what looks wrong: {wrong} (then {trial.text()})"


def _fvu_claimed(claim: Claim | None) -> bool:
    return claim is not None and claim.fvu is not None


def _doubt(
    sae: SparseAutoencoder, reference: Tensor, target: Tensor | None, measured: Measured
) -> str:
    """In line, but b_dec treated otherwise reconstructs much better: what to say; "" if not."""
    if measured.fvu is None:
        return ""
    x = reference[:_TRIAL_ROWS]
    y = None if target is None else target[:_TRIAL_ROWS]
    for reading in readings(sae, x, None):
        if not reading.of_bias:
            continue
        trial = measure(reading.sae, x, y)
        much_better = trial.fvu is not None and trial.fvu < BETTER * measured.fvu
        if much_better and trial.l0 < (1 + L0_TOLERANCE) * measured.l0:
            return (
                f"on {measured.rows:,} reference rows it has {measured.text()}, but read otherwise "
                f"it reconstructs much better; what looks wrong: {reading.wrong} (then "
                f"{trial.text()})"
            )
    return ""


def _ce_recovered(
    sae: SparseAutoencoder, written: Tensor | None, model: "Model", tokens: Tensor | None
) -> float | None:
    from sae.data.placement import placement_of
    from sae.evaluation.downstream import measure_downstream

    if tokens is None or written is None:
        what = "tokens" if tokens is None else "target"
        raise InputError(f"needs {what} as well", where="model", given=None)
    placement = placement_of(sae)
    found = measure_downstream(
        model,
        placement.read,
        lambda x: placement.sae(x).x_hat,
        written.float().mean(0),
        tokens,
        model.keep_mask(tokens),
        target=placement.written,
    )
    return found.recovered_zero
