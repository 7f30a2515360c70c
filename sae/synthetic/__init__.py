"""Synthetic worlds: rows whose true features are known, without end.

The world of SynthSAEBench (Chanin and Garriga-Alonso 2026, arXiv 2602.14687): features that fire by
a power law, in trees, correlated, in superposition. `config` says what a world is, `world` makes
it, `drawing` draws its rows (in C++ where it can), `stream` is what a trainer reads.
"""
