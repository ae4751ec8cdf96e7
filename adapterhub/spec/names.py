"""Names, versions, and references: how a release is written."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapterhub.errors import UsageError

PART = r"[a-z0-9][a-z0-9._-]*"


NAME = re.compile(rf"(?:{PART}/)?{PART}")


VERSION = re.compile(r"(?:(?:0|[1-9][0-9]{0,8})\.){2}(?:0|[1-9][0-9]{0,8})")


TAG = re.compile(r"[a-z][a-z0-9._-]*")


RESERVED = {"base", "mix", "gate", "logits"}
"""Words of the expression language; no adapter may have one of them as its whole name."""


def check_name(name: str) -> str:
    """The name itself. Raises UsageError for what is none."""
    if not NAME.fullmatch(name) or ".." in name or name in RESERVED or len(name) > 96:
        raise UsageError(
            f"{name!r} is not a name for an adapter",
            "use [a-z0-9][a-z0-9._-]*, optionally with an owner: me/sentiment (at most 96 characters, not a reserved word)",
        )
    return name


def check_version(text: str) -> str:
    """X.Y.Z itself. Raises UsageError for any other shape."""
    if not VERSION.fullmatch(text):
        raise UsageError(f"{text!r} is not a version", "write it as X.Y.Z, for example 0.2.0")
    return text


@dataclass(frozen=True)
class Reference:
    """`me/x`, `me/x@0.1.0` or `me/x@stable`: a name and, perhaps, an exact version or a tag."""

    name: str
    at: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        name, at, version = text.partition("@")
        check_name(name)
        if at and not TAG.fullmatch(version):
            check_version(version)
        return cls(name, version if at else None)

    def __str__(self) -> str:
        return self.name if self.at is None else f"{self.name}@{self.at}"
