"""What every architecture's configuration has."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from saescope.config import Config
from saescope.errors import InputError, check_range

ADDED = "added"
"""metadata of a field that came after files and runs without it; at its default it changes nothing,
and a run with it is the same run as one without"""


@dataclass(frozen=True, kw_only=True)
class SAEConfig(Config):
    """What every architecture's configuration has; each adds its own fields and its `kind`."""

    d_sae: int = 8192
    """Width of the dictionary (number of features)."""

    def __post_init__(self) -> None:
        check_range("sae.d_sae", self.d_sae, low=1)

    @property
    def has_k(self) -> bool:
        """Whether a field k sets the number of features a row has."""
        return any(each.name == "k" for each in fields(self))

    @property
    def penalty_warmup(self) -> float:
        """Fraction of a run over which a sparsity penalty grows to its weight; 0 without one."""
        return 0.0

    @property
    def needs_labels(self) -> bool:
        """Whether the loss needs a class of each row (`RawBatch.labels`)."""
        return False

    @property
    def needs_neighbours(self) -> bool:
        """Whether the loss needs neighbouring tokens side by side, known by `RawBatch.labels`."""
        return False

    def for_sites(self, number: int) -> Self:
        """The configuration of an SAE that reads so many sites; most do not depend on it."""
        del number
        return self

    def check_k(self, name: str, value: int) -> None:
        """Raise InputError unless a row can have `value` features; name is the field's."""
        check_range(f"sae.{name}", value, low=1)
        if value > self.d_sae:
            raise InputError(
                f"{name} exceeds the dictionary",
                where=f"sae.{name}",
                given=value,
                allowed=f"1 to {self.d_sae}",
            )

    def with_target_l0(self, target: float) -> Self:
        """The same configuration for a mean L0 of `target`: sets k, where there is one.

        Raises InputError if k cannot be that.
        """
        if not self.has_k:
            return self
        kinds = {each.name: each.type for each in fields(self)}
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


def without_added(cls: type[SAEConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's saved values without `ADDED` fields that are at their defaults."""
    default = {each.name: each.default for each in fields(cls) if each.metadata.get(ADDED)}
    return {k: v for k, v in values.items() if k not in default or v != default[k]}


def kind_of(config: SAEConfig) -> str:
    """The name an architecture's configuration carries."""
    return str(config.kind)  # type: ignore[attr-defined]
