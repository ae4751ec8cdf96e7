"""PEFT's files: read without running anything in them, and written by the type that says the same exactly."""
