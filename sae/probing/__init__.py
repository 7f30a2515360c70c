"""Sparse probing: what a label of a text needs of an SAE's features, and of what else there is."""
