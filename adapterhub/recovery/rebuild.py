"""Make a lost index again from the blobs: releases, their parents and their signatures. No torch.

A blob is a release when it is a manifest, under its own digest, and all of its files are here. One that a release has among its
*files* is none, whatever it says: anyone may publish an adapter whose log is the manifest of another.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import HubError, IntegrityError, UsageError
from adapterhub.files import durable
from adapterhub.opening import find, new_index, open
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import File, Release
from adapterhub.store.blobs import DATABASE, Problem, Store
from adapterhub.store.records import KEPT
from adapterhub.trust.signature import LARGEST as LARGEST_ENVELOPE
from adapterhub.trust.signature import RELEASE, opened, statement

LARGEST_MANIFEST = 8 << 20
"""Bytes."""
GONE = (
    "tags and where they went, yanks, dates, serial numbers, which versions were removed, leases, a registry's accounts"
)
"""What no blob tells of."""


@dataclass(frozen=True)
class Rebuilt:
    """What became of a hub whose index was lost."""

    root: Path
    releases: list[Release]
    signatures: int
    left: list[Problem]
    """Manifests that were not believed, or whose files are not all here."""
    damaged: Path | None
    """Where the old index is kept; None when there was none."""


def rebuild(path: str | Path | None = None) -> Rebuilt:
    """Make the index of a hub again from its blobs and put it in the place of the old one, which is kept.

    Raises UsageError for a hub whose index is sound, HubError for one without blobs."""
    root = find(path)
    store = Store(root)
    if not any(store.listed()):
        raise HubError(f"no blobs in {root}", "there is nothing to make an index from")
    with store.alone():
        if _sound(root):
            raise UsageError(
                f"the index of {root} is sound", f"to make it again all the same, move {DATABASE} away first"
            )
        manifests, envelopes = _documents(store)
        releases, left = _believed(store, manifests)
        signed = [(r, e) for r in releases for e in envelopes.get(r.digest, ()) if _about(e, r)]
        with durable.scratch(root / DATABASE) as folder:
            index = new_index(folder / DATABASE)
            index.add(releases)
            for release, envelope in signed:
                index.sign(release.digest, envelope)
            index.remember(KEPT, 1)
            index.remember("serial", int(time.time()))  # higher than any that was seen: clients refuse an older state
            damaged = _put_aside(root)
            durable.move(folder / DATABASE, root / DATABASE)
    return Rebuilt(root, releases, len(signed), left, damaged)


def _sound(root: Path) -> bool:
    try:
        return open(root).index.check() == []
    except HubError:
        return False


def _documents(store: Store) -> tuple[dict[str, Release], dict[str, list[bytes]]]:
    """The manifests among the blobs by their digest; the envelopes by the digest of the release that they speak of."""
    manifests, envelopes = {}, defaultdict(list)
    for path in store.listed():
        if path.is_symlink() or path.stat().st_size > max(LARGEST_MANIFEST, LARGEST_ENVELOPE):
            continue
        with path.open("rb") as file:
            if file.read(1) != b"{":
                continue
            data = b"{" + file.read()
        digest = digest_of(data)
        if digest != f"sha256:{path.name}":
            continue
        with suppress(HubError):
            manifests[digest] = Release.decode(data, digest)
            continue
        with suppress(HubError):
            envelopes[str(opened(data, RELEASE, ())[0].get("digest"))].append(data)
    return manifests, envelopes


def _about(envelope: bytes, release: Release) -> bool:
    return opened(envelope, RELEASE, ())[0] == statement(release)


def _believed(store: Store, manifests: dict[str, Release]) -> tuple[list[Release], list[Problem]]:
    """The releases, by name and version; and why other manifests are none."""
    files = {digest: _made_of(store, release.manifest.needs) for digest, release in manifests.items()}
    holders: dict[str, int] = dict.fromkeys(manifests, 0)
    for inside in files.values():
        for digest in inside & manifests.keys():
            holders[digest] += 1
    believed, doubted = [], set()
    # No manifest is, through others, a file of itself (it would have to hold its own digest): each comes after its holders.
    waiting = [digest for digest, count in holders.items() if not count]
    while waiting:
        digest = waiting.pop()
        if digest not in doubted:
            believed.append(digest)
        for inner in files[digest] & manifests.keys():
            doubted |= {inner} if digest not in doubted else set()
            holders[inner] -= 1
            if not holders[inner]:
                waiting.append(inner)
    named = defaultdict(list)
    for digest in believed:
        named[str(manifests[digest])].append(manifests[digest])
    releases, left = [], []
    for digest in sorted(doubted):
        left.append(Problem(store.path(digest), "is a manifest, and a file of another release: it may be forged"))
    for label, same in sorted(named.items()):
        for release in same:
            lacking = [problem for _, problem in store.verify(release.manifest.needs, lambda blob: False)]
            place = store.path(release.digest)
            if len(same) > 1:
                left.append(Problem(place, f"is one of {len(same)} manifests that are called {label}", (label,)))
            elif lacking:
                left.append(Problem(place, f"lacks {lacking[0].path.name}: it {lacking[0].reason}", (label,)))
            else:
                releases.append(release)
    return releases, left


def _made_of(store: Store, files: list[File]) -> set[str]:
    """The digests of all blobs behind these files, as far as their lists of parts can be read."""
    found = {file.digest for file in files}
    for file in files:
        with suppress(IntegrityError):
            found |= {blob.digest for blob in store.blobs(file)}
    return found


def _put_aside(root: Path) -> Path | None:
    """Move the old index away, with the journal that belongs to it: beside the new one it would be taken for the new one's."""
    taken = sum(1 for _ in root.glob(f"{DATABASE}.damaged*"))
    aside = root / f"{DATABASE}.damaged{taken or ''}"
    for name in ("-journal", "-wal", "-shm", ""):
        old = root / f"{DATABASE}{name}"
        if old.exists():
            durable.move(old, aside.with_name(aside.name + name))
    return aside if aside.exists() else None
