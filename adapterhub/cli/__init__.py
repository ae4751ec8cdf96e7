"""The commands; the one place that prints errors. Floor 6, manager."""
