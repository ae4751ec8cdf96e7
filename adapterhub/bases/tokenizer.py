"""The digest of what a tokenizer does: the same text becomes the same tokens, however its file is written."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from adapterhub.files.bounded import read_json
from adapterhub.spec.digest import canonical, digest_of

_ASIDE = ("version", "padding", "truncation", "post_processor")
"""Of tokenizer.json: what callers set from case to case, and what is added around a text."""


def tokenizer_digest(folder: Path) -> str:
    """The digest of the tokenizer beside a model's weights; "" where there is no tokenizer.json that can be read."""
    path = folder / "tokenizer.json"
    try:
        state = path.stat()
    except OSError:
        return ""
    return _digest(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=8)
def _digest(path: Path, size: int, changed: int) -> str:
    """By the file's identity: it may have megabytes, and a process asks again for every adapter."""
    try:
        found = read_json(path.read_bytes(), 256 << 20, strict=False)
        return digest_of(canonical({key: _plain(value) for key, value in found.items() if key not in _ASIDE}))
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


def _plain(part: Any) -> Any:
    """Merges are written "a b" by older and ["a", "b"] by newer versions of the library."""
    if isinstance(part, dict) and isinstance(part.get("merges"), list):
        merges = [m.split(" ") if isinstance(m, str) else m for m in part["merges"]]
        return {**part, "merges": merges}
    return part
