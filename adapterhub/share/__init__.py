"""Releases that go out: to the Hub, to a registry, as a bundle. Floor 5, manager."""
