"""Seeds: which numbers are one, and how others follow from it."""

from __future__ import annotations

import hashlib

from adapterhub.errors import UsageError


def check_seed(seed: int) -> int:
    """The seed itself. Raises UsageError for what is none of torch's and NumPy's."""
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"the seed is {seed}", "give a number from 0 to 4294967295")
    return seed


def seeded(*words: object) -> int:
    """A seed that follows from these words, whatever the machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:7], "big")
