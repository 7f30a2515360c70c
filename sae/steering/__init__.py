"""Edits of a model while it runs, and the features of a text."""
