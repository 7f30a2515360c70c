"""Results of the feature store's queries: small frozen dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saescope.metrics import Metric

BOTH_ENDS = "both_ends"
"""names a store's fact that its features are ends: so many positive ones, then the negative ones"""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A store in numbers."""

    name: str
    model: str
    site: str
    architecture: str
    d_sae: int
    context: int
    n_live: int
    n_dead: int
    n_activations: int
    n_sequences: int
    n_tokens: int
    n_kept: int
    n_documents: int
    mean_active: float
    """Active features per kept position, over the whole store (L0)."""
    metrics: Mapping[str, Any]
    """What the SAE measured, by the name of the metric."""
    table: Mapping[str, Metric]
    """The table of metrics, with rows that only this store has."""
    bytes: int


@dataclass(frozen=True)
class Between:
    """Bounds, both included, of a column of numbers; None means no bound.

    Features that have no value there are left out where there is a bound.
    """

    column: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class OneOf:
    """The values that a column of texts may have."""

    column: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FeatureFilter:
    """Which features a table shows; None means no bound."""

    ids: tuple[int, ...] | None = None
    """Only these features (a label search gives them)."""
    not_ids: tuple[int, ...] | None = None
    """All but these (those with a label, to find those without)."""
    between: tuple[Between, ...] = ()
    """Bounds of any columns of numbers, those that the indexer added too."""
    one_of: tuple[OneOf, ...] = ()
    """Values of any columns of texts."""
    feature_min: int | None = None
    feature_max: int | None = None
    density_min: float | None = None
    density_max: float | None = None
    activation_min: float | None = None
    """Lower bound of the feature's maximum activation."""
    activation_max: float | None = None
    state: str = "all"
    """"all", "live" (active at least once), "dead" or "dense" (at over 10 % of positions)."""


@dataclass(frozen=True)
class FeaturePage:
    """Some rows of the feature table, and how many the filter lets through."""

    rows: pa.Table
    total: int


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One feature's row; mean and std are over the positions at which it is active."""

    feature: int
    first_row: int
    n_active: int
    density: float
    mean: float
    std: float
    max: float
    n_documents: int
    more: Mapping[str, Any] = field(default_factory=dict)
    """Columns that the indexer added (decoder norm, ...)."""

    @property
    def dead(self) -> bool:
        """Whether it is never active in this store."""
        return self.n_active == 0


@dataclass(frozen=True)
class Histogram:
    """Counts [bins] between edges [bins + 1]; bins are closed on the right."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class TokenShare:
    """A token that a feature fires on."""

    token_id: int
    token: str
    count: int
    """positions with this token at which the feature fires"""
    share: float
    """of the kept positions with this token"""
    mean: float
    """of the activation at those"""


@dataclass(frozen=True)
class PositionProfile:
    """Where in a sequence a feature fires: counts [bins] of indices between edges [bins + 1]."""

    edges: NDArray[np.int64]
    """a bin has the indices from its edge up to the next, which is not in it"""
    counts: NDArray[np.int64]
    kept: NDArray[np.int64]
    """kept positions in each bin, of which the feature fires at `counts`"""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A feature at one position, with the tokens around it.

    tokens, activations, same_document, token_ids have one element a shown token. `start` is the
    index of the first of them in the sequence, `index` that of the example itself.
    """

    kind: str
    interval: int
    """0 (weakest fifth of (0, max]) to 4; -1 for the strongest examples."""
    rank: int
    sequence: int
    index: int
    start: int
    position: int
    """sequence * context + index: its number in the whole store"""
    activation: float
    document: int
    title: str
    token_ids: list[int]
    tokens: list[str]
    activations: list[float]
    same_document: list[bool]

    @property
    def place(self) -> int:
        """The former name of `index`."""
        return self.index


@dataclass(frozen=True)
class LogitEffect:
    """How much a feature's decoder direction raises or lowers one token's logit."""

    token_id: int
    token: str
    value: float


@dataclass(frozen=True)
class Logits:
    """The tokens a feature raises and lowers most, strongest first."""

    top: list[LogitEffect]
    bottom: list[LogitEffect]


@dataclass(frozen=True)
class Neighbour:
    """A feature whose decoder direction is near."""

    feature: int
    cosine: float
    density: float
    max: float


@dataclass(frozen=True)
class Coactivation:
    """A feature that fires where this one does, counted over all kept positions."""

    feature: int
    together: int
    """positions at which both fire"""
    share: float
    """the share of this feature's positions at which the other fires"""
    pmi: float
    """pointwise mutual information of the two firing, in nats"""
    correlation: float
    """Pearson's, of the two firings (0 or 1 at each position)"""
    density: float
    """of the other feature"""


@dataclass(frozen=True)
class Active:
    """Features active in a stretch of text, ordered by position and then strength, [n] each."""

    position: NDArray[np.int64]
    feature: NDArray[np.int32]
    activation: NDArray[np.float32]


@dataclass(frozen=True)
class Spelling:
    """One way in which a phrase is cut into tokens, and how often the corpus has it so."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Occurrences:
    """Where a token or a phrase stands, [n] each, where features can fire."""

    position: NDArray[np.int64]
    """of its last token"""
    length: NDArray[np.int64]
    """how many tokens it is there"""
    n_left_out: int
    """occurrences whose last token no feature sees: first of its sequence, or special"""
    spellings: tuple[Spelling, ...]
    """the ways in which it is cut into tokens, commonest first"""

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.position)


@dataclass(frozen=True, kw_only=True)
class TokenFeatures:
    """Features that fire on a token or phrase, best first, [n] each."""

    n_occurrences: int
    n_read: int
    """occurrences that were read: all, or those in evenly spread stretches of the text"""
    n_features: int
    """how many features fire on any that was read"""
    feature: NDArray[np.int32]
    count: NDArray[np.int64]
    """occurrences, of those read, at which it fires"""
    share: NDArray[np.float64]
    """count / n_read"""
    dice: NDArray[np.float64]
    """how nearly it fires there and nowhere else, 0 to 1: twice the firings there over occurrences
    plus all of the feature's positions (Dice, 1945)"""
    lift: NDArray[np.float64]
    """share / density: how many times as often as at any position"""
    mean: NDArray[np.float64]
    """over the occurrences at which it fires"""
    max: NDArray[np.float32]
    """the same"""


@dataclass(frozen=True)
class Spots:
    """Positions at which a feature fires, strongest first."""

    n: int
    """how many there are, of which some are here"""
    position: NDArray[np.int64]
    activation: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Nearby:
    """Positions at which a feature fires, and where another does near by; strongest first."""

    n: int
    """how many there are, of which some are here"""
    position: NDArray[np.int64]
    activation: NDArray[np.float32]
    other_position: NDArray[np.int64]
    other_activation: NDArray[np.float32]


@dataclass(frozen=True)
class DocumentPage:
    """Some documents as (number, key, title), and how many there are."""

    rows: list[tuple[int, str, str]]
    total: int


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document: its tokens, [n] each, in the order of the text."""

    document: int
    key: str
    title: str
    split: str
    """"of the harvest: train or held_out"""
    position: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    tokens: list[str]


@dataclass(frozen=True)
class ColumnHelp:
    """A column of a table, for who writes SQL."""

    name: str
    type: str
    about: str


@dataclass(frozen=True)
class TableHelp:
    """A table, for who writes SQL."""

    name: str
    about: str
    columns: tuple[ColumnHelp, ...]
