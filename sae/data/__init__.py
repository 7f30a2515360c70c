"""Rows for training: which harvest and site they are from, and streams of batches."""
