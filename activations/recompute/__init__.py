"""Rows made again from the model: for harvests that store none, and for damaged chunks."""
