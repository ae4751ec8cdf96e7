"""An adapter in memory: read, named, fitted to a base, summed as changes, published. Floor 4, runtime."""
