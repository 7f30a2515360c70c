"""Evaluation: one file is one family of metrics, each with a protocol and self-tests."""
