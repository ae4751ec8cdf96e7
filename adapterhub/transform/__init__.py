"""Releases made of releases: merged, compressed, composed."""
