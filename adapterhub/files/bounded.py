"""JSON and TOML that somebody else wrote, read under bounds on length and depth before any object is made of it."""

from __future__ import annotations

import json
import math
import re
import string
import tomllib
from itertools import accumulate
from typing import Any, NoReturn

LENGTH = 32 << 20
"""Bytes of a document, unless the caller says less."""
DEPTH = 64
"""Lists and tables inside of one another."""
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_BRACKETS = bytes(byte for byte in range(256) if byte not in _STEP)
_KEY = (string.ascii_letters + string.digits + "_- \t").encode()
_JSON_TEXT = re.compile(rb'"[^"]*"')
_TOML_TEXT = re.compile(rb"#[^\n]*|\"\"\".*?\"\"\"|'''.*?'''|\"[^\"\n]*\"|'[^'\n]*'", re.DOTALL)


class TooMuch(ValueError):
    """A document that is longer, or nested deeper, than we read."""


def read_json(data: bytes | str, length: int = LENGTH, strict: bool = True) -> Any:
    """The value of a JSON text. strict: a key that stands twice, NaN and numbers beyond float64 are refused.

    Raises ValueError (TooMuch beyond `length` bytes or DEPTH levels)."""
    _check(data, length, _JSON_TEXT)
    if not strict:
        return json.loads(data)
    return json.loads(data, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)


def read_toml(data: bytes | str, length: int = LENGTH) -> dict[str, Any]:
    """The table of a TOML text, line ends of any kind. Raises ValueError (TooMuch beyond `length` bytes or DEPTH levels)."""
    bare = _check(data, length, _TOML_TEXT)
    if b"." * DEPTH in bare.translate(None, _KEY):  # a dotted key, which takes tomllib long
        raise TooMuch(f"it is nested deeper than {DEPTH} levels")
    text = data.decode() if isinstance(data, bytes) else data
    found = tomllib.loads(text.replace("\r\n", "\n"))
    level: list[Any] = [found]  # dotted keys nest without brackets
    for _ in range(DEPTH):
        tables = [each for each in level if isinstance(each, dict)]
        level = [v for each in tables for v in each.values()]
        level += [v for each in (e for e in level if isinstance(e, list)) for v in each]
        if not level:
            return found
    raise TooMuch(f"it is nested deeper than {DEPTH} levels")


def _check(data: bytes | str, length: int, text: re.Pattern[bytes]) -> bytes:
    """The document without its texts."""
    raw = data.encode() if isinstance(data, str) else data
    if len(raw) > length:
        raise TooMuch(f"it has {len(raw)} bytes (at most {length})")
    bare = text.sub(b"", raw.replace(b"\\\\", b"").replace(b'\\"', b""))
    if max(accumulate(map(_STEP.__getitem__, bare.translate(None, _BRACKETS))), default=0) > DEPTH:
        raise TooMuch(f"it is nested deeper than {DEPTH} levels")
    return bare


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value
