"""Sparse autoencoders: train, evaluate, index, steer, convert.

Public names are imported when they are first used, so that `import sae` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.architectures import architectures
    from sae.base import SAEConfig, SparseAutoencoder
    from sae.certificate import Certificate, certify
    from sae.codes import SparseCodes
    from sae.convert_command import ConvertConfig, convert
    from sae.evaluation.command import EvaluateConfig, evaluate
    from sae.formats._claim import Claim
    from sae.formats.hub import upload
    from sae.indexing import IndexConfig, index
    from sae.inference import TextFeatures, features_of_text
    from sae.loading import load
    from sae.steering import splice, steer
    from sae.training.command import TrainConfig, train

_WHERE = {
    "Certificate": "sae.certificate",
    "Claim": "sae.formats._claim",
    "ConvertConfig": "sae.convert_command",
    "EvaluateConfig": "sae.evaluation.command",
    "IndexConfig": "sae.indexing",
    "SAEConfig": "sae.base",
    "SparseAutoencoder": "sae.base",
    "SparseCodes": "sae.codes",
    "TextFeatures": "sae.inference",
    "TrainConfig": "sae.training.command",
    "architectures": "sae.architectures",
    "certify": "sae.certificate",
    "convert": "sae.convert_command",
    "evaluate": "sae.evaluation.command",
    "features_of_text": "sae.inference",
    "index": "sae.indexing",
    "load": "sae.loading",
    "splice": "sae.steering",
    "steer": "sae.steering",
    "train": "sae.training.command",
    "upload": "sae.formats.hub",
}

__all__ = [
    "Certificate",
    "Claim",
    "ConvertConfig",
    "EvaluateConfig",
    "IndexConfig",
    "SAEConfig",
    "SparseAutoencoder",
    "SparseCodes",
    "TextFeatures",
    "TrainConfig",
    "architectures",
    "certify",
    "convert",
    "evaluate",
    "features_of_text",
    "index",
    "load",
    "splice",
    "steer",
    "train",
    "upload",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value  # a submodule of the same name must not win over it later
    return value
