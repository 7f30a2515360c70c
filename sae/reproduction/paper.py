"""What a paper is here, and what its trials show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sae.reproduction.claims import Claim
from saescope.pieces import Chart, Table

Settings = Mapping[str, Any]
"""of one trial: plain values by name, its seed among them"""
Row = Mapping[str, Any]
"""a trial's settings and what was measured, by name"""
Verdict = Literal["reproduced", "partly reproduced", "not reproduced"]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that a trial left, beside the charts that are drawn of numbers."""

    key: str
    title: str
    about: str
    png: str
    """the file, in base64, as JSON keeps it"""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What all trials of a paper show."""

    claims: tuple[Claim, ...]
    """what was claimed, each beside its null"""
    why: str
    """the verdict's reason, in a sentence or some"""
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """By the claims: all hold, some do, or none."""
        held = [each.holds for each in self.claims]
        if all(held):
            return "reproduced"
        return "partly reproduced" if any(held) else "not reproduced"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One paper's central experiment at small scale."""

    title: str
    citation: str
    """authors, where it appeared, its number at arXiv"""
    claim: str
    """what the paper claims"""
    run: tuple[str, ...]
    """what is run here: data, sizes, what is compared, how it is measured"""
    easier: str
    """whether that is the paper's claim, or an easier one"""
    trials: Callable[[bool], Sequence[Settings]]
    """settings of all trials; of few that take a minute or two if asked (True)"""
    measure: Callable[[Settings, Path], Mapping[str, Any]]
    """does one trial, in a folder that all share; what it gives is kept as JSON"""
    findings: Callable[[Sequence[Row]], Findings]
    """what the rows of all trials show, whole or quick"""
    configs: tuple[str, ...] = ()
    """files of configs/papers for the paper's own scale"""
    scale: str = ""
    """what the paper's own scale takes"""
