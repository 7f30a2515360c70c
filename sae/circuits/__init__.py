"""Circuits: which features, errors and tokens make a model say what it says on one prompt."""
