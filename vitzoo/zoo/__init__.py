"""Weights: the table of what is published, and how a file becomes a model."""
