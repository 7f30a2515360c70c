from sae.architectures import list_architectures as list_architectures
from sae.base import SAEConfig as SAEConfig
from sae.base import SparseAutoencoder as SparseAutoencoder
from sae.certificate import Certificate as Certificate
from sae.certificate import certify as certify
from sae.codes import SparseCodes as SparseCodes
from sae.convert_command import ConvertConfig as ConvertConfig
from sae.convert_command import convert as convert
from sae.evaluation.command import EvaluateConfig as EvaluateConfig
from sae.evaluation.command import evaluate as evaluate
from sae.formats._claim import Claim as Claim
from sae.formats.hub import upload as upload
from sae.indexing import IndexConfig as IndexConfig
from sae.indexing import index as index
from sae.inference import TextFeatures as TextFeatures
from sae.inference import features_of_text as features_of_text
from sae.loading import load as load
from sae.steering import splice as splice
from sae.steering import steer as steer
from sae.training.command import TrainConfig as TrainConfig
from sae.training.command import train as train

__all__: list[str]
