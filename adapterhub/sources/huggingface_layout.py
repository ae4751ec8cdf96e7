"""How a release lies in a repo of the Hub, so that plain PEFT loads it too and no byte is pushed twice.

A repo holds one adapter; version 1.2.0 is the tag v1.2.0, which is made last. Beside PEFT's files lies `adapterhub/`:

manifest.json             the release's manifest
manifests/<digest>.json   those of the parents that it needs
signatures/<digest>.json  the envelopes of a signed release
layout.json               digest of a blob -> [[file of the repo, offset, bytes], ...], where its bytes are, in order
rest                      the bytes that stand in no other file
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from adapterhub.errors import IntegrityError
from adapterhub.files.bounded import read_json
from adapterhub.files.safetensors_header import read_layout
from adapterhub.spec.digest import canonical, check_digest, digest_of
from adapterhub.spec.manifest import File, Release
from adapterhub.store.blobs import Store

OURS = "adapterhub/"


MANIFEST = f"{OURS}manifest.json"


LARGEST_MANIFEST = 8 << 20
"""Bytes of a manifest, card or list of signatures."""
REST = "adapterhub/rest"
TENSORS = "adapter_model.safetensors"
Piece = tuple[str, int, int]
"""A file of the repo, where in it, how many bytes."""
Layout = dict[str, list[Piece]]
"""Digest of a blob -> the pieces that it is made of."""
LARGEST = 16 << 20
"""Bytes of layout.json."""


def build(store: Store, releases: Iterable[Release], peft: bytes | None) -> tuple[Layout, bytes]:
    """The layout of all blobs of these releases beside PEFT's tensor file, and the bytes that are not in that."""
    known = _tensors(peft) if peft else {}
    layout: Layout = {}
    rest = bytearray()
    for release in releases:
        for role, file in [*sorted(release.manifest.files.items()), ("sketch", release.manifest.base.sketch)]:
            edges = _edges(store, file) if role == "tensors" else set()
            start = 0
            for blob in store.parts(file):
                end = start + blob.size
                inner = sorted({0, blob.size} | {edge - start for edge in edges if start < edge < end})
                _place(layout, rest, known, blob, store.read(blob), inner)
                start = end
            if file.parts:
                listed = store.blobs(file)[0]
                _place(layout, rest, known, listed, store.read(listed), [0, listed.size])
    return layout, bytes(rest)


def encode(layout: Layout) -> bytes:
    return canonical(layout)


def decode(data: bytes, repo: str) -> Layout:
    """Raises IntegrityError for what is no layout, or names files outside the two that hold bytes."""
    try:
        found = read_json(data, LARGEST)
        layout = {check_digest(digest): [(p, int(o), int(n)) for p, o, n in pieces] for digest, pieces in found.items()}
        if any(p not in (REST, TENSORS) or o < 0 or n < 0 for pieces in layout.values() for p, o, n in pieces):
            raise ValueError("it names other files")
        return layout
    except Exception as error:
        raise IntegrityError(f"hf:{repo}: layout.json is none: {error}", "ask who published it") from None


def _place(layout: Layout, rest: bytearray, known: dict[str, int], blob: File, data: bytes, edges: list[int]) -> None:
    if blob.digest in layout:
        return
    pieces: list[Piece] = []
    for begin, end in pairwise(edges):
        part = data[begin:end]
        at = known.get(digest_of(part))
        path, offset = (TENSORS, at) if at is not None else (REST, len(rest))
        if at is None:
            rest += part
        if pieces and pieces[-1][0] == path and pieces[-1][1] + pieces[-1][2] == offset:
            pieces[-1] = (path, pieces[-1][1], pieces[-1][2] + len(part))
        else:
            pieces.append((path, offset, len(part)))
    layout[blob.digest] = pieces


def _edges(store: Store, file: File) -> set[int]:
    """Where the tensors of a file begin, by its header alone."""
    return {entry.offset for entry in read_layout(store.header(file), file.size).values()}


def _tensors(peft: bytes) -> dict[str, int]:
    """Digest of each tensor's bytes in PEFT's file -> where they begin."""
    starts = sorted({entry.offset for entry in read_layout(peft).values()})
    return {digest_of(peft[begin:end]): begin for begin, end in pairwise([*starts, len(peft)])}
