"""Edits of a model while it runs, and the features of a text."""

from saescope.moved import names_in

__getattr__ = names_in(__name__, "sae.steering.steer")
