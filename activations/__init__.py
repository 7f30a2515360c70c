"""From text to stored activations: models and their sites, corpora, the harvest, the loader."""

from activations.corpora.documents import CorpusConfig
from activations.harvesting.append import append
from activations.harvesting.bring import bring
from activations.harvesting.config import HarvestConfig
from activations.harvesting.pipeline import harvest
from activations.loading.loader import ActivationLoader
from activations.models.around import model_around
from activations.models.chat import ChatTokens, chat_tokens
from activations.models.config import ModelConfig
from activations.models.language import Model
from activations.models.load import load_model
from activations.recompute.computed_rows import ComputedRows
from activations.storage.reader import ActivationStore
from activations.storage.row_source import SiteStatistics
from activations.storage.verify import verify

# a store knows neither models nor harvesting: what it needs of them is handed to it here
ActivationStore.rows_by_model = ComputedRows
ActivationStore.store_arrays = staticmethod(bring)
ActivationStore.verified_by = staticmethod(verify)

__all__ = [
    "ActivationLoader",
    "ActivationStore",
    "ChatTokens",
    "CorpusConfig",
    "HarvestConfig",
    "Model",
    "ModelConfig",
    "SiteStatistics",
    "append",
    "chat_tokens",
    "harvest",
    "load_model",
    "model_around",
]
