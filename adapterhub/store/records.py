"""Manifests and signatures as blobs: what an index that was lost is made again from. No torch.

The index keeps them too and lists them among the files of their release, so gc, verify, repair and backup know them. A hub of
before they were kept gets them with what is added next, with gc and with repair.
"""

from __future__ import annotations

from collections.abc import Iterable

from adapterhub.spec.manifest import File
from adapterhub.store.blobs import Store, identify
from adapterhub.store.index import Index

KEPT = "manifests are kept as blobs"
AT_ONCE = 1000
"""How many an install writes of those that are lacking from earlier."""


def put(store: Store, documents: Iterable[bytes]) -> None:
    """Keep these manifests or envelopes as blobs."""
    blobs = {identify(document): document for document in documents}
    store.fill(blobs, lambda blob, folders: store.take(blob, [blobs[blob]], "the index", folders))


def complete(index: Index, store: Store, most: int | None = None) -> None:
    """Put those that the store lacks, at most so many. Only while the store is `shared` or `alone`."""
    lacking = []
    for file in index.stored():
        if not store.path(file.digest).exists() and (data := index.record(file.digest)) is not None:
            lacking.append(data)
            if len(lacking) == most:
                break
    put(store, lacking)
    if (most is None or len(lacking) < most) and index.remembered(KEPT) is None:
        index.remember(KEPT, 1)


def expected(index: Index, file: File) -> bool:
    """Whether a hub that lacks this file lacks something: not the record of a release from before they were kept."""
    return index.remembered(KEPT) is not None or index.record(file.digest) is None
