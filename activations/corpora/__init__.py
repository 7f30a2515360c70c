"""Corpora: documents from files and hubs, pictures, and how tokens are packed into sequences."""

from saescope.moved import names_in

__getattr__ = names_in(__name__, "activations.corpora.documents")
