from sae.analysis.attention.attribution import Attribution as Attribution
from sae.analysis.attention.attribution import attribute as attribute
from sae.analysis.attention.heads import HeadAttribution as HeadAttribution
from sae.analysis.attention.heads import head_attribution as head_attribution

__all__: list[str]
