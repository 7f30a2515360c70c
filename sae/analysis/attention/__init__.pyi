from sae.analysis.attention.attribution import Attribution as Attribution
from sae.analysis.attention.attribution import attribute as attribute
from sae.analysis.attention.families import FeatureSources as FeatureSources
from sae.analysis.attention.families import feature_sources as feature_sources
from sae.analysis.attention.head_table import HeadRow as HeadRow
from sae.analysis.attention.head_table import head_table as head_table
from sae.analysis.attention.heads import HeadAttribution as HeadAttribution
from sae.analysis.attention.heads import head_attribution as head_attribution
from sae.analysis.attention.prefix import PrefixCurve as PrefixCurve
from sae.analysis.attention.prefix import PrefixTest as PrefixTest
from sae.analysis.attention.prefix import prefix_attention as prefix_attention
from sae.analysis.attention.prefix import prefix_test as prefix_test
from sae.analysis.attention.recursive import Node as Node
from sae.analysis.attention.recursive import attribute_recursively as attribute_recursively
from sae.analysis.attention.source_classes import Distances as Distances

__all__: list[str]
