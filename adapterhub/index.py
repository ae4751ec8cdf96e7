"""The index of a hub: which releases there are. `adapterhub_registry.database.Database` is the one over SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from packaging.version import Version

from adapterhub.manifest import File, Manifest, Release


@dataclass(frozen=True)
class Row:
    """What a list shows of a release, without its manifest."""

    name: str
    version: str
    digest: str
    """The manifest's."""
    method: str
    """How it was made: see `kind`."""
    base: str
    """The base's name as its author wrote it."""
    size: int
    """Bytes of its files, without the base's sketch."""
    created: str
    """When it came into this hub: UTC, ISO 8601."""
    tags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class Index(Protocol):
    """Which releases there are. Each call that changes something is one transaction: all of it, or nothing."""

    def names(self) -> list[str]:
        """Sorted."""

    def releases(self, name: str | None = None) -> list[Row]:
        """Sorted by name, then from the newest version to the oldest."""

    def get(self, name: str, version: str) -> Release | None:
        """The release, its manifest's digest checked. Raises IntegrityError."""

    def add(self, releases: Sequence[Release]) -> None:
        """Add what is not there yet. Raises NameInUse when a version is there with another digest."""

    def remove(self, digests: Sequence[str]) -> None:
        """Remove the releases with these digests, and their tags."""

    def set_tag(self, name: str, tag: str, version: str) -> None:
        """Let the tag name this version, which must exist; a tag moves."""

    def children(self, digest: str) -> list[str]:
        """Those ("name@version") that have this release as a parent, sorted."""

    def files(self) -> dict[File, list[str]]:
        """Every blob that a release needs, and which ("name@version") need it."""

    def check(self) -> list[str]:
        """What is wrong with the index itself: manifests that do not match their digest, columns that contradict them."""


def kind(manifest: Manifest) -> str:
    """How a release was made, in a word or two: "lora", "composition", "merge", "lora + compeft"."""
    if manifest.compose is not None:
        return "composition"
    if manifest.method is not None:
        made = manifest.method.name
    elif any(parent.relation == "merge" for parent in manifest.parents):
        made = "merge"
    else:
        made = ", ".join(sorted({form for forms in manifest.forms.values() for form in forms}))
    return " + ".join([made, *(codec.name for codec in manifest.codecs)])


def newest_first(rows: Sequence[Row]) -> list[Row]:
    """By name, then from the newest version to the oldest."""
    return sorted(sorted(rows, key=lambda row: Version(row.version), reverse=True), key=lambda row: row.name)
