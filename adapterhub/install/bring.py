"""Bring releases of a source into a hub: every byte hashed, every signature looked at, all rows at once."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub.files.safetensors_header import read_header
from adapterhub.sources import room
from adapterhub.sources.source import Source, closure
from adapterhub.spec.manifest import Release
from adapterhub.store.naming import warn_of_look_alikes
from adapterhub.store.releases import Releases
from adapterhub.trust.envelopes import worth
from adapterhub.trust.policy import check_signed, policy


def bring(hub: Releases, source: Source, roots: Sequence[Release], max_bytes: int | None = None) -> list[Release]:
    """Bring these releases of a source, with the parents they need: every byte hashed, all rows at once.

    max_bytes: what may be announced of what is not here. Raises as `install` does."""
    releases = closure(source, roots)
    room.check_cap(room.announced(hub.store, releases), max_bytes, str(releases[0]))
    envelopes = {each.digest: worth(each, source.signatures(each.digest)) for each in releases}
    rules = policy()
    for release in releases:
        check_signed(release, envelopes[release.digest], rules)
    files = {file for release in releases for file in release.manifest.needs}
    warn_of_look_alikes(hub.index, {release.name for release in releases})
    with hub.adding() as store:
        source.fetch(files, store)
        for file in (release.manifest.files.get("tensors") for release in releases):
            if file is not None:
                read_header(store.header(file), file.size)
        hub.add(releases, store)
        for release in releases:
            for envelope in envelopes[release.digest]:
                hub.sign(release.digest, envelope)
    return releases
