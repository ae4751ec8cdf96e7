"""What a plugin subclasses, one module a kind, and what its hooks must return. Floor 2, runtime."""
