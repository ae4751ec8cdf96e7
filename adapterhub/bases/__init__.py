"""Base models: a known name, a folder or a Hugging Face repo id becomes a folder of safetensors, then a loaded model.

A known name is an entry point of the group `adapterhub.bases`: a class whose instances have `note` (what its record
says about it) and `folder() -> Path` (makes the folder if it must).
"""
