"""Releases made of releases: merged, compressed, composed. Floor 5, runtime."""
