"""A release with the parents it needs as a plain folder (docs/guide/bundle.md)."""

from __future__ import annotations

from pathlib import Path

from adapterhub.files import durable
from adapterhub.files.bounded import read_json
from adapterhub.sources.bundle import hex_of
from adapterhub.sources.source import closure
from adapterhub.spec.digest import canonical
from adapterhub.spec.manifest import Release
from adapterhub.store.releases import Releases


def write(hub: Releases, root: Release, folder: Path) -> None:
    """Write the release and the parents it needs as a bundle. Raises NameInUse when the folder is there already."""
    from adapterhub.sources.disk import Disk

    with durable.new_folder(folder) as out, hub.store.shared():
        releases = closure(Disk(hub), [root])
        blobs = {b for release in releases for file in release.manifest.needs for b in hub.store.blobs(file)}
        for blob in sorted(blobs, key=lambda blob: blob.digest):
            durable.write_bytes(out / "blobs" / hex_of(blob.digest), hub.store.read(blob))
        for release in releases:
            name = "manifest.json" if release == root else f"manifests/{hex_of(release.digest)}.json"
            durable.write_bytes(out / name, release.manifest.encode())
            if envelopes := hub.index.signatures(release.digest):
                signed = canonical([read_json(envelope) for envelope in envelopes])
                durable.write_bytes(out / f"signatures/{hex_of(release.digest)}.json", signed)
