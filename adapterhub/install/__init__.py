"""Releases that come in: resolve, lock, fetch."""
