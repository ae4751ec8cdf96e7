"""Another hub on this machine as a source. Its blobs never change, so they get a second name instead of a copy."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from adapterhub.errors import AGAIN, IntegrityError, NotFound
from adapterhub.files import durable
from adapterhub.files.progress import bar
from adapterhub.sources.source import Candidate
from adapterhub.spec.manifest import File, Release
from adapterhub.spec.names import Reference
from adapterhub.store.blobs import Store
from adapterhub.store.releases import Releases


class Disk:
    """The hub in a folder. Raises NotFound when there is none."""

    def __init__(self, root: Path | Releases):
        if isinstance(root, Path):
            from adapterhub.opening import open_source

            root = open_source(root)
        self.hub = root
        self.label = str(root.root)

    def choose(self, reference: Reference) -> Candidate:
        """The release that a reference means there."""
        release = self.hub.resolve(reference)
        return Candidate(release.name, release.version, release.digest)

    def candidates(self, name: str) -> list[Candidate]:
        return [Candidate.of(row) for row in self.hub.index.releases(name)]

    def release(self, name: str, version: str, digest: str | None = None) -> Release:
        release = self.hub.index.get(name, version)
        if release is None:
            raise NotFound(f"{self.label} has no {name}@{version}", "it may have been removed there")
        if digest not in (None, release.digest):
            raise IntegrityError(f"{self.label}: {release} is {release.digest}, not {digest}", AGAIN)
        return release

    def fetch(self, files: Collection[File], store: Store) -> None:
        mine = self.hub.store
        with durable.lock(mine.root / "hub.lock", shared=True, create=False):
            blobs = {blob for file in files for blob in mine.blobs(file)}
            with bar(f"install from {self.label}", sum(blob.size for blob in blobs)) as advance:
                store.adopt({blob: mine.path(blob.digest) for blob in blobs}, advance)

    def signatures(self, digest: str) -> list[bytes]:
        return self.hub.index.signatures(digest)
