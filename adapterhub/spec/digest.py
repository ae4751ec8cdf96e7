"""Canonical JSON and the digests of bytes."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from adapterhub.errors import ManifestError


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check_digest(text: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        raise ManifestError(f"{text[:80]!r} is not a digest", "a digest is sha256: and 64 lower-case hex digits")
    return text
