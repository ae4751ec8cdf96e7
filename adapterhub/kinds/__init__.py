"""What a plugin subclasses, one module a kind of part, what such a part is given, and what its hooks must return."""
