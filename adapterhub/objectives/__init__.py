"""The built-in objectives. Floor 4, runtime."""
