"""From text to stored activations: models and their sites, corpora, the harvest, the loader."""

from activations.corpora.documents import CorpusConfig
from activations.harvesting.append import append
from activations.harvesting.pipeline import HarvestConfig, harvest
from activations.loading.loader import ActivationLoader
from activations.models.language import Model, ModelConfig, load_model
from activations.storage.reader import ActivationStore, SiteStatistics

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
