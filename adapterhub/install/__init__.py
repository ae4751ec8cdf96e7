"""Releases that come in: resolve, lock, fetch. Floor 5, manager."""
