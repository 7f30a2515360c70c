"""From an SAE and a harvest to a feature store."""

from saescope.moved import names_in

__getattr__ = names_in(__name__, "sae.indexing.build", "sae.commands.index")
