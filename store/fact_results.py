"""Results of the queries of a feature's facts: groups of documents, layers, heads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DocumentGroup:
    """A topic, or a source, of some of the store's documents."""

    kind: str
    """"topic" or "source" """
    name: str
    documents: int
    n_features: int
    """features that fire in its documents more often than by chance"""


@dataclass(frozen=True, kw_only=True)
class Enrichment:
    """A group of documents in which a feature fires more often than by chance."""

    kind: str
    name: str
    documents: int
    """of the group, in which the feature fires"""
    expected: float
    """how many these would be on average if documents were drawn at random"""
    log_odds: float
    """of firing in a document of the group and in another, in nats"""
    q: float
    """false-discovery rate, over all features and groups, at which this one is found"""
    positions: int
    """in the group's documents, at which the feature fires"""
    share: float
    """of the feature's positions"""
    expected_share: float
    """of all kept positions that are in the group"""


@dataclass(frozen=True)
class Layer:
    """One of the layers of an SAE of several."""

    layer: int
    """from 0, of those that the SAE reads"""
    site: str
    tokens: int
    """on which the features were measured there; 0 for a crosscoder"""
    cosine_next: float | None
    """mean cosine of a token's centred activations here and at the next layer, where measured"""


@dataclass(frozen=True)
class LayerShare:
    """What a feature does at one layer."""

    layer: int
    count: int | None
    """tokens on which it fires there; None for a crosscoder"""
    amount: float
    """sum of its activations there; for a crosscoder the norm of what it writes there"""
    share: float
    """of the amount at all layers"""


@dataclass(frozen=True)
class MeasuredEffect:
    """The measured change of one token's log-probability."""

    token_id: int
    token: str
    value: float
    """mean over positions, in nats"""
    error: float | None
    """standard error of that mean; None of one position"""


@dataclass(frozen=True)
class MeasuredEffects:
    """The tokens that a feature raises and lowers most when it is added where it is active."""

    top: list[MeasuredEffect]
    bottom: list[MeasuredEffect]


@dataclass(frozen=True)
class HeadNorm:
    """What a feature writes to one attention head."""

    head: int
    norm: float
    share: float
    """of the sum of the norms over heads"""
