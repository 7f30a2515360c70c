from sae.analysis.attention.attribution import Attribution as Attribution
from sae.analysis.attention.attribution import attribute as attribute
from sae.analysis.attention.heads import HeadAttribution as HeadAttribution
from sae.analysis.attention.heads import head_attribution as head_attribution
from sae.analysis.attention.recursive import Node as Node
from sae.analysis.attention.recursive import attribute_recursively as attribute_recursively

__all__: list[str]
