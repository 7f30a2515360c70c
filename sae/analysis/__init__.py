"""Analyses of layers, features and dictionaries; one file is one question."""
