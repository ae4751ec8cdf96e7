"""Where releases are installed from, and the bundle: a release with its parents as a plain folder (docs/bundle.md).

manifest.json            the release's manifest
manifests/<digest>.json  those of its parents, and of theirs
blobs/<digest>           every blob they need; <digest> is 64 hex digits of sha256
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from adapterhub import durable
from adapterhub.compose import check_expressions
from adapterhub.errors import IntegrityError, ManifestError, NotFound, UnsafeFile, UsageError
from adapterhub.manifest import File, Manifest, Parent, Release, digest_of
from adapterhub.store import DATABASE

if TYPE_CHECKING:
    from adapterhub.packages import Packages

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle"}
LARGEST_MANIFEST = 8 << 20
"""Bytes."""
_AGAIN = "get the bundle again from its source"


class Source(Protocol):
    """What can be installed from."""

    def root(self) -> Release:
        """The release that is asked for."""

    def parent(self, parent: Parent) -> Release:
        """One that it needs."""

    def blob(self, file: File) -> Path:
        """Where the blob's bytes are; whoever copies them checks them."""


class Bundle:
    """A bundle as a source. No symbolic link in it is followed, and what its manifests do not name is not read."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        for below, _, names in os.walk(self.folder):
            for name in names:
                if Path(name).suffix.lower() in PICKLES:
                    raise UnsafeFile(
                        f"{Path(below, name)} is a pickle, which can run any program when it is opened",
                        "ask for the adapter as safetensors",
                    )

    def root(self) -> Release:
        return _release(self._bytes("manifest.json"))

    def parent(self, parent: Parent) -> Release:
        release = _release(self._bytes(f"manifests/{_hex(parent.digest)}.json"))
        if release.digest != parent.digest:
            raise IntegrityError(f"{self.folder}: the manifest of {release} is not {parent.digest}", _AGAIN)
        return release

    def blob(self, file: File) -> Path:
        return self._file(f"blobs/{_hex(file.digest)}")

    def _file(self, name: str) -> Path:
        path = self.folder / name
        try:
            plain = os.path.realpath(path) == str(path) and stat.S_ISREG(path.lstat().st_mode)
        except OSError:
            raise NotFound(f"the bundle {self.folder} has no {name}", _AGAIN) from None
        if not plain:
            raise UnsafeFile(f"{path} is no plain file inside the bundle", "a bundle holds plain files, no links")
        return path

    def _bytes(self, name: str) -> bytes:
        path = self._file(name)
        with path.open("rb") as file:
            data = file.read(LARGEST_MANIFEST + 1)
        if len(data) > LARGEST_MANIFEST:
            raise ManifestError(f"{path} is too large for a manifest", _AGAIN)
        return data


class Other:
    """Another hub as a source."""

    def __init__(self, hub: Packages, reference: str):
        self.hub = hub
        self.reference = reference

    def root(self) -> Release:
        return self.hub.resolve(self.reference)

    def parent(self, parent: Parent) -> Release:
        return self.hub.exact(parent)

    def blob(self, file: File) -> Path:
        return self.hub.store.path(file.digest)


def source(text: str) -> Source:
    """What `install` is told: a bundle's folder, or HUB:name[@version], HUB a folder with a hub.db. Raises NotFound."""
    folder = durable.user_path(text)
    if folder.is_dir():
        if (folder / "manifest.json").is_file():
            return Bundle(folder)
        if (folder / "adapter_config.json").is_file():
            raise UsageError(f"{text} is a PEFT adapter, not a bundle", f"adapterhub import {text} --name NAME")
        if (folder / DATABASE).is_file():
            raise UsageError(f"{text} is a hub, not a bundle", f"say which of its adapters: {text}:NAME")
        raise NotFound(f"{text} holds no manifest.json", "make a bundle with adapterhub export NAME --format bundle")
    hub, colon, reference = text.rpartition(":")
    if not colon:
        raise NotFound(f"no folder {text}", "install from a bundle's folder, or from a hub: HUB:name[@version]")
    from adapterhub.hub import open

    return Other(open(hub), reference)


def closure(source: Source, root: Release) -> list[Release]:
    """The release and everything it was made from, itself first. Raises ManifestError for a composition of other things."""
    found = {root.digest: root}
    waiting = [root]
    while waiting:
        manifest = waiting.pop().manifest
        check_expressions(manifest)
        for parent in manifest.parents:
            if parent.digest in found:
                continue
            release = source.parent(parent)
            if (release.name, release.version) != (parent.name, parent.version):
                raise ManifestError(f"{release} is called {parent.name}@{parent.version} by its child", _AGAIN)
            found[release.digest] = release
            waiting.append(release)
    return list(found.values())


def write(hub: Packages, root: Release, folder: Path) -> None:
    """Write the release and its parents as a bundle. Raises NameInUse when the folder is there already."""
    with durable.new_folder(folder) as out:
        releases = closure(Other(hub, str(root)), root)
        for file in {file for release in releases for file in release.manifest.blobs}:
            durable.write_file(out / "blobs" / _hex(file.digest), hub.store.checked(file))
        for release in releases:
            name = "manifest.json" if release == root else f"manifests/{_hex(release.digest)}.json"
            durable.write_bytes(out / name, release.manifest.encode())


def _release(data: bytes) -> Release:
    return Release(Manifest.decode(data), digest_of(data))


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
