"""The index of a hub: which releases there are. `adapterhub_registry.database.Database` is the one over SQL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapterhub.spec.manifest import File, Manifest, Release

ANY = "*"
"""For `set_tag`: whatever the tag means now."""
FILES_AT_GC = "files at the last gc"
"""For `remember`: how many files the index listed then, less those of releases that were removed since."""


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
    yanked: str | None = None
    """Why it should no longer be chosen."""
    tags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class Index(Protocol):
    """Which releases there are. Each call that changes something is one transaction: all of it, or nothing."""

    # --- reading

    def names(self, containing: str = "", limit: int | None = None) -> list[str]:
        """Sorted; those that hold the text."""

    def releases(
        self, name: str | None = None, after: tuple[str, str] | None = None, limit: int | None = None
    ) -> list[Row]:
        """Sorted by name, then from the newest version to the oldest; those after (name, version)."""

    def search(
        self, words: Sequence[str], structure: str | None = None, after: str = "", limit: int | None = None
    ) -> list[Row]:
        """The newest release of each adapter that has all the words in its name, method, base or licence, sorted by name;
        of one base's structure; those after a name. A yanked release is newest only where nothing else is."""

    def get(self, name: str, version: str) -> Release | None:
        """The release, its manifest's digest checked. Raises IntegrityError."""

    def find(self, digest: str) -> Release | None:
        """The release whose manifest has this digest, checked. Raises IntegrityError."""

    def children(self, digest: str) -> list[str]:
        """Those ("name@version") that have this release as a parent, sorted."""

    def missing_parents(self) -> list[tuple[str, str]]:
        """("name@version", the parent that it needs to run and that is not here, as "name@version")."""

    def files(self) -> dict[File, list[str]]:
        """Every file that a release needs, its manifest and its signatures among them, and which ("name@version") need it."""

    def stored(self) -> Iterator[File]:
        """The files of `files`, each once, one after the other: a million of them take no memory."""

    def record(self, digest: str) -> bytes | None:
        """The manifest or the signature's envelope with this digest, checked; None when there is neither."""

    def copy(self) -> bytes:
        """The file that the index is, in one state though others write. Raises UsageError where it is not one."""

    def check(self, manifests: bool = True) -> list[str]:
        """What is wrong with the index itself; with `manifests` also those that do not match their digest, columns that
        contradict them, and rows that changed since they were written."""

    def serial(self) -> int:
        """Grows with every change."""

    def tag_moves(self, name: str, tag: str) -> list[str | None]:
        """The versions that a tag has named, oldest first; None where it was taken away."""

    def signatures(self, digest: str) -> list[bytes]:
        """The envelopes that came with a release."""

    def gone(self, name: str) -> dict[str, str]:
        """Versions that were here and were removed -> their digests. A version never comes back as something else."""

    def leased(self, now: float) -> set[str]:
        """Digests of blobs that somebody is still bringing."""

    def remembered(self, key: str) -> int | None:
        """A number that `remember` was given."""

    # --- writing

    def add(self, releases: Sequence[Release]) -> None:
        """Add what is not there yet. Raises NameInUse when a version is there, or was, with another digest."""

    def remove(self, digests: Sequence[str]) -> None:
        """Remove the releases with these digests, and their tags; their versions are remembered as gone."""

    def set_tag(self, name: str, tag: str, version: str | None, expected: str | None = ANY) -> None:
        """Let the tag name this version, which must exist; None takes it away.

        expected: what it means now (None: nothing). Raises TagMoved when it means something else."""

    def yank(self, name: str, version: str, reason: str | None) -> None:
        """Say why a version should no longer be chosen; None takes that back."""

    def sign(self, digest: str, envelope: bytes) -> None:
        """Keep an envelope with a release."""

    def remember(self, key: str, value: int) -> None:
        """Keep a number about the hub (at most 40 characters of key)."""

    def lease(self, digests: Iterable[str], until: float) -> None:
        """Keep these blobs from being taken away until then (seconds of the epoch); 0 ends it. Leases that ended are
        forgotten. Many blobs take several transactions."""


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
