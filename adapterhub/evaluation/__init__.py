"""Measure a model on data, with intervals."""
