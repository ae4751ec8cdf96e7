"""Measure a model on data, with intervals. Floor 5, runtime."""
