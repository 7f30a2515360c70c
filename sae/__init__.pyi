from sae.analysis.attention.attribution import Attribution as Attribution
from sae.analysis.attention.attribution import attribute as attribute
from sae.architectures import list_architectures as list_architectures
from sae.commands.convert import ConvertConfig as ConvertConfig
from sae.commands.convert import convert as convert
from sae.commands.evaluate import evaluate as evaluate
from sae.commands.evaluate_config import EvaluateConfig as EvaluateConfig
from sae.commands.index import IndexConfig as IndexConfig
from sae.commands.index import index as index
from sae.commands.train import train as train
from sae.core.base import SAEConfig as SAEConfig
from sae.core.base import SparseAutoencoder as SparseAutoencoder
from sae.formats._claim import Claim as Claim
from sae.formats.certificate import Certificate as Certificate
from sae.formats.certificate import certify as certify
from sae.formats.load import load as load
from sae.formats.predictive import load_predictive as load_predictive
from sae.formats.transcoder_sets import load_transcoders as load_transcoders
from sae.formats.upload import upload as upload
from sae.kernels.codes import SparseCodes as SparseCodes
from sae.steering.edits import Edit as Edit
from sae.steering.steer import splice as splice
from sae.steering.steer import steer as steer
from sae.steering.text_features import TextFeatures as TextFeatures
from sae.steering.text_features import features_of_text as features_of_text
from sae.training.config import TrainConfig as TrainConfig

__all__: list[str]
