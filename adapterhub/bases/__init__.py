"""Base models: found, loaded, recognised by their fingerprint. Floor 4, runtime.

A known name is an entry point of the group `adapterhub.bases`: a class whose instances have `note` (what its record
says about it) and `folder() -> Path` (makes the folder if it must).
"""

from typing import Any


def __getattr__(name: str) -> Any:
    from adapterhub.moved import heir

    return heir(__name__, name)
