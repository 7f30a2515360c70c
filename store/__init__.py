"""The feature store: every feature activation of an SAE over a corpus, in one read-only file."""

from store.annotations import Annotations
from store.feature_store import FeatureStore
from store.results import FeatureFilter
from store.writer import StoreWriter

__all__ = ["Annotations", "FeatureFilter", "FeatureStore", "StoreWriter"]
