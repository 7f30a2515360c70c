"""Rows made again from the model: for harvests that store none, and for damaged chunks."""

from saescope.moved import names_in

__getattr__ = names_in(__name__, "activations.recompute.window", "activations.storage.window_data")
