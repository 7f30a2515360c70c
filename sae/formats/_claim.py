"""What an SAE is said to measure."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Metrics that an SAE is said to have, and by which source."""

    l0: float | None = None
    """mean number of features active on a row"""
    fvu: float | None = None
    """fraction of variance unexplained"""
    ce_recovered: float | None = None
    """cross-entropy recovered, against zero-ablation"""
    source: str = "the caller"
    """where it is said: a folder's name, the SAE's own files, the caller"""

    def __post_init__(self) -> None:
        if self.l0 is not None:
            check_range("claimed.l0", self.l0, above=0)
        if self.fvu is not None:
            check_range("claimed.fvu", self.fvu, low=0)

    @classmethod
    def of(cls, given: "Claim | Mapping[str, Any]") -> "Claim":
        """A claim, or one from a mapping with some of l0, fvu and ce_recovered."""
        if isinstance(given, Claim):
            return given
        allowed = ("l0", "fvu", "ce_recovered", "source")
        unknown = sorted(set(given) - set(allowed))
        if unknown:
            raise InputError("unknown metrics", where="claimed", given=unknown, allowed=allowed)
        return cls(**given)

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any] | None, source: str) -> "Claim | None":
        """What some measured metrics say; None if there are none."""
        known = {n: (metrics or {}).get(n) for n in ("l0", "fvu", "ce_recovered")}
        if all(value is None for value in known.values()):
            return None
        return cls(**known, source=source)

    def merge(self, other: "Claim | None") -> Self:
        """This claim, with what it leaves open taken from another."""
        mine, theirs = self.stated(), {} if other is None else other.stated()
        added = theirs.keys() - mine.keys()
        sources = ([self.source] if mine else []) + ([other.source] if other and added else [])
        return type(self)(**{**theirs, **mine}, source=" and ".join(sources) or self.source)

    def stated(self) -> dict[str, float]:
        """The metrics that are claimed."""
        found = asdict(self)
        return {n: v for n, v in found.items() if n != "source" and v is not None}
