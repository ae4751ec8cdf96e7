"""The bundle: a release with the parents it needs as a plain folder (docs/guide/bundle.md), to install from.

manifest.json             the release's manifest
manifests/<digest>.json   those of its parents, and of theirs
blobs/<digest>            every blob they need; <digest> is 64 hex digits of sha256
signatures/<digest>.json  the envelopes of a signed release, by its manifest's digest
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from adapterhub.errors import AGAIN, IntegrityError, ManifestError, NotFound, UnsafeFile
from adapterhub.files import durable
from adapterhub.files.bounded import read_json
from adapterhub.files.progress import bar
from adapterhub.sources.room import check_disk
from adapterhub.sources.source import Candidate
from adapterhub.spec.digest import canonical, digest_of
from adapterhub.spec.manifest import File, Release
from adapterhub.store import segments
from adapterhub.store.blobs import Store

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle"}
LARGEST_MANIFEST = 8 << 20
"""Bytes."""
LARGEST_SIGNATURES = 1 << 20
"""Bytes."""


class Bundle:
    """A bundle as a source. No symbolic link in it is followed, and what its manifests do not name is not read."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.label = str(folder)
        for below, _, names in os.walk(self.folder):
            for name in names:
                if Path(name).suffix.lower() in PICKLES:
                    raise UnsafeFile(
                        f"{Path(below, name)} is a pickle, which can run any program when it is opened",
                        "ask for the adapter as safetensors",
                    )
        self._root = _release(self._bytes("manifest.json", LARGEST_MANIFEST))

    @property
    def root(self) -> Candidate:
        """The release that it was made for."""
        return Candidate(self._root.name, self._root.version, self._root.digest)

    def candidates(self, name: str) -> list[Candidate]:
        return [self.root] if name == self._root.name else []

    def release(self, name: str, version: str, digest: str | None = None) -> Release:
        root = self._root
        if (name, version) == (root.name, root.version) and digest in (None, root.digest):
            return root
        if digest is None:
            raise NotFound(f"the bundle {self.folder} has no {name}@{version}", f"it holds {root}")
        release = _release(self._bytes(f"manifests/{hex_of(digest)}.json", LARGEST_MANIFEST))
        if release.digest != digest:
            raise IntegrityError(f"{self.folder}: the manifest of {release} is not {digest}", AGAIN)
        return release

    def fetch(self, files: Collection[File], store: Store) -> None:
        blobs = set()
        for file in files:
            blobs.add(file if not file.parts else self._listed(file, store, blobs))
        paths = {blob: self._file(f"blobs/{hex_of(blob.digest)}") for blob in blobs}
        check_disk(store.root, sum(blob.size for blob in paths if store.fault(blob, hashing=False) is not None))
        with bar(f"install from {self.label}", sum(blob.size for blob in paths)) as advance:

            def take(blob: File, folders: set[Path]) -> None:
                store.take(blob, durable.read_chunks(paths[blob]), paths[blob], folders)
                advance(blob.size)

            store.fill(paths, take)

    def _listed(self, file: File, store: Store, blobs: set[File]) -> File:
        """The list of a file's parts as a blob; the parts join `blobs`."""
        name = f"blobs/{hex_of(file.digest)}"
        data = self._bytes(name, segments.LARGEST_LIST)
        if digest_of(data) != file.digest:
            raise IntegrityError(f"{self.folder / name} is not {file.digest}", AGAIN)
        blobs |= set(segments.decode(data, file))
        return File(digest=file.digest, size=len(data))

    def signatures(self, digest: str) -> list[bytes]:
        name = f"signatures/{hex_of(digest)}.json"
        if not (self.folder / name).exists():
            return []
        try:
            found = read_json(self._bytes(name, LARGEST_SIGNATURES))
            return [canonical(envelope) for envelope in found if isinstance(envelope, dict)]
        except (ValueError, TypeError, RecursionError):
            raise ManifestError(f"{self.folder / name} holds no signatures", AGAIN) from None

    def _file(self, name: str) -> Path:
        path = self.folder / name
        try:
            plain = os.path.realpath(path) == str(path) and stat.S_ISREG(path.lstat().st_mode)
        except OSError:
            raise NotFound(f"the bundle {self.folder} has no {name}", AGAIN) from None
        if not plain:
            raise UnsafeFile(f"{path} is no plain file inside the bundle", "a bundle holds plain files, no links")
        return path

    def _bytes(self, name: str, largest: int) -> bytes:
        path = self._file(name)
        with path.open("rb") as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            raise ManifestError(f"{path} is too large for what it is", AGAIN)
        return data


def _release(data: bytes) -> Release:
    return Release.decode(data)


def hex_of(digest: str) -> str:
    return digest.removeprefix("sha256:")
