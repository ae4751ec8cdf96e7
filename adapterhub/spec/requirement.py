"""What a user asks for: a name and the versions of it that would do."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Protocol

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from adapterhub.errors import UsageError
from adapterhub.spec.digest import check_digest
from adapterhub.spec.names import TAG, VERSION, check_name

SOURCE = re.compile(r"[a-z][a-z0-9_-]*")
_FORM = re.compile(
    rf"(?:(?P<source>{SOURCE.pattern}):)?(?P<name>[^@<>=!~\s]+)\s*(?:@(?P<at>\S+)|(?P<versions>[<>=!~].*))?"
)
LARGEST = 1000
"""Characters of a requirement."""
_HINT = "write acme/sql, acme/sql>=1.2,<2, acme/sql@1.2.0, acme/sql@stable or acme/sql@sha256:..."


class Offered(Protocol):
    """What a requirement is held against: a release that somebody offers."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def tags(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Requirement:
    """`acme/sql>=1.2,<2`, `acme/sql@1.2.0`, `acme/sql@stable` (a tag), `acme/sql@sha256:...`; with a source's name before
    it (`team:acme/sql`) it is looked for there only."""

    name: str
    versions: SpecifierSet = field(default_factory=SpecifierSet)
    at: str | None = None
    """A tag or a digest; the one release that it names."""
    source: str | None = None

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Raises UsageError for what is no requirement."""
        if re.match(r"https?:/", text.strip(), re.IGNORECASE):  # it may hold a secret, so it is not repeated
            raise UsageError("an address does not say which adapter", _HINT)
        if len(text) > LARGEST:
            raise UsageError(f"{text[:40]!r}... has {len(text)} characters (at most {LARGEST})", _HINT)
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise UsageError(f"{text!r} does not say which adapter", _HINT)
        check_name(found["name"])
        versions, at = found["versions"] or "", found["at"]
        if at and VERSION.fullmatch(at):
            versions, at = f"=={at}", None
        elif at and at.startswith("sha256:"):
            check_digest(at)
        elif at and not TAG.fullmatch(at):
            raise UsageError(f"{text!r}: {at!r} is no version, tag or digest", _HINT)
        return cls(found["name"], _specifiers(versions, text), at, found["source"])

    @property
    def exact(self) -> bool:
        """Whether it names one release: then even one that was yanked."""
        return self.at is not None or any(s.operator == "==" and "*" not in s.version for s in self.versions)

    def accepts(self, candidate: Offered) -> bool:
        if self.at is not None and self.at not in (candidate.digest, *candidate.tags):
            return False
        return candidate.name == self.name and self.versions.contains(candidate.version)

    def __str__(self) -> str:
        shown = f"@{self.at}" if self.at else ",".join(sorted(map(str, self.versions), reverse=True))
        return (f"{self.source}:" if self.source else "") + self.name + shown


def _specifiers(text: str, whole: str) -> SpecifierSet:
    try:
        found = SpecifierSet(text)
        if any(s.operator == "===" for s in found):
            raise InvalidSpecifier("there is no ===")
    except InvalidSpecifier as error:
        raise UsageError(f"{whole!r}: {str(error).splitlines()[0]}", _HINT) from None
    return found
