"""What can be done with tensors by who knows no adapter. Floor 2, runtime."""
