"""What a plugin subclasses, one module a kind, what its hooks are given, and what they must return. Floor 2, runtime."""
