"""What can be done with tensors by who knows no adapter: files of them, factors, largest entries, entropy codes."""
