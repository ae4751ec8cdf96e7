"""The built-in methods. Floor 2, runtime."""
