"""The feature store: every feature activation of an SAE over a corpus, in one read-only file."""

from store.annotations import Annotations
from store.feature_store import FeatureStore
from store.results import Between, FeatureFilter, OneOf
from store.writer import StoreWriter

__all__ = ["Annotations", "Between", "FeatureFilter", "FeatureStore", "OneOf", "StoreWriter"]
