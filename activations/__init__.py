"""From text to stored activations: models and their sites, corpora, the harvest, the loader."""

from activations.append import append
from activations.corpora import CorpusConfig
from activations.harvest import HarvestConfig, harvest
from activations.loader import ActivationLoader
from activations.models import Model, ModelConfig, load_model
from activations.zarr_store import ActivationStore, SiteStatistics

__all__ = [
    "ActivationLoader",
    "ActivationStore",
    "CorpusConfig",
    "HarvestConfig",
    "Model",
    "ModelConfig",
    "SiteStatistics",
    "append",
    "harvest",
    "load_model",
]
