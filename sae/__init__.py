"""Sparse autoencoders: train, evaluate, index, steer.

Public names are imported when they are first used, so that `import sae` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.architectures import architectures
    from sae.base import SAEConfig, SparseAutoencoder
    from sae.codes import SparseCodes
    from sae.evaluation.command import EvaluateConfig, evaluate
    from sae.indexing import IndexConfig, index
    from sae.inference import TextFeatures, features_of_text
    from sae.loading import load
    from sae.steering import splice, steer
    from sae.training.command import TrainConfig, train

_WHERE = {
    "EvaluateConfig": "sae.evaluation.command",
    "IndexConfig": "sae.indexing",
    "SAEConfig": "sae.base",
    "SparseAutoencoder": "sae.base",
    "SparseCodes": "sae.codes",
    "TextFeatures": "sae.inference",
    "TrainConfig": "sae.training.command",
    "architectures": "sae.architectures",
    "evaluate": "sae.evaluation.command",
    "features_of_text": "sae.inference",
    "index": "sae.indexing",
    "load": "sae.loading",
    "splice": "sae.steering",
    "steer": "sae.steering",
    "train": "sae.training.command",
}

__all__ = [
    "EvaluateConfig",
    "IndexConfig",
    "SAEConfig",
    "SparseAutoencoder",
    "SparseCodes",
    "TextFeatures",
    "TrainConfig",
    "architectures",
    "evaluate",
    "features_of_text",
    "index",
    "load",
    "splice",
    "steer",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value  # a submodule of the same name must not win over it later
    return value
