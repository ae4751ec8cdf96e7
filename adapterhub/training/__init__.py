"""Data and a method make an adapter. Floor 5, runtime."""
