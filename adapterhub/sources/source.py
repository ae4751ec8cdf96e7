"""What can be installed from: one protocol, and everything that a release needs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from adapterhub.errors import AGAIN, ManifestError
from adapterhub.spec.manifest import File, Release
from adapterhub.spec.parents import check_expressions
from adapterhub.store.blobs import Store
from adapterhub.store.index import Row

LARGEST_GRAPH = 20_000
"""Releases that one may need, itself included."""


@dataclass(frozen=True)
class Candidate:
    """A release that a source offers, before its manifest is looked at."""

    name: str
    version: str
    digest: str
    """The manifest's."""
    created: str = ""
    """When it came there: UTC, ISO 8601; "" when the source does not say."""
    yanked: str | None = None
    """Why it should no longer be chosen."""
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, row: Row) -> Candidate:
        return cls(row.name, row.version, row.digest, row.created, row.yanked, row.tags)


class Source(Protocol):
    """What can be installed from. Nothing that it says is believed before it is hashed."""

    label: str
    """What errors and lists call it."""

    def candidates(self, name: str) -> list[Candidate]:
        """What it has under a name, newest first; [] when it has none."""

    def release(self, name: str, version: str, digest: str | None = None) -> Release:
        """The manifest. Raises NotFound, and IntegrityError when its digest is not the one asked for."""

    def fetch(self, files: Collection[File], store: Store) -> None:
        """Bring every blob behind these files into the store. Raises IntegrityError for other bytes, NotFound."""

    def signatures(self, digest: str) -> list[bytes]:
        """The envelopes that it has for a release."""


def closure(source: Source, roots: Iterable[Release]) -> list[Release]:
    """These releases and everything that they need to run, themselves first.

    Raises ManifestError for a composition of other things, or for more than a source may ask us to take."""
    found = {root.digest: root for root in roots}
    waiting = list(found.values())
    while waiting:
        manifest = waiting.pop().manifest
        check_expressions(manifest)
        for parent in manifest.required:
            if parent.digest in found:
                continue
            release = source.release(parent.name, parent.version, parent.digest)
            if (release.name, release.version) != (parent.name, parent.version):
                raise ManifestError(f"{release} is called {parent.label} by its child", AGAIN)
            if len(found) == LARGEST_GRAPH:
                raise ManifestError(f"it needs more than {LARGEST_GRAPH} releases", "install its parts by themselves")
            found[release.digest] = release
            waiting.append(release)
    return list(found.values())
