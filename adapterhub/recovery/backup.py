"""A hub in one file, and a hub made of it: one state of the index, and every blob that it lists. No torch.

The file is an uncompressed tar, so that any other tool can look into it; this is the only reader that we trust with one.
First `backup.json` (format, the index's digest and size, every blob's), then `hub.db`, then the blobs by their digest: the
same hub gives the same bytes. Trainings under way, and what is half fetched, are not in it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import HubError, IntegrityError, NameInUse
from adapterhub.files import durable
from adapterhub.files.bounded import read_json
from adapterhub.files.progress import bar
from adapterhub.sources.room import check_disk
from adapterhub.spec.digest import canonical, check_digest
from adapterhub.spec.manifest import File
from adapterhub.store.blobs import DATABASE, Store, hashed, identify
from adapterhub.store.records import complete, expected
from adapterhub.store.releases import Releases

LIST = "backup.json"
LARGEST_LIST = 256 << 20
"""Bytes."""
BLOCK = 512
_NOT_ONE = "get the backup again, or take an older one"


def backup(hub: Releases, path: Path) -> int:
    """Write the hub to a new file, in one state although others write; returns its bytes.

    Raises NameInUse for a file that is there, IntegrityError for a damaged blob, UsageError for an index that is not a file."""
    if path.exists():
        raise NameInUse(f"{path} is there already", "name a file that does not exist yet")
    with hub.store.shared():
        with suppress(HubError):  # a hub that nobody can write to is copied as it is
            complete(hub.index, hub.store)
        index = hub.index.copy()  # first: whatever it lists stays while the store is shared
        files = _files(hub, index, path)
        for _, problem in hub.store.verify(files, lambda blob: False):
            raise IntegrityError(str(problem), "adapterhub repair mends it; then back up again")
        blobs = sorted({b for f in files for b in hub.store.blobs(f)}, key=lambda blob: blob.digest)
        head = identify(index)
        listed = {"format": 1, "index": [head.digest, head.size], "blobs": [[b.digest, b.size] for b in blobs]}
        first = canonical(listed)
        size = _size(first, head, blobs)
        with bar(f"backup to {path.name}", size) as advance:

            def chunks() -> Iterator[bytes]:
                yield from _member(LIST, len(first), [first])
                yield from _member(DATABASE, len(index), [index])
                for blob in blobs:
                    source = hub.store.path(blob.digest)
                    yield from _member(_name(blob), blob.size, hashed(durable.read_chunks(source), blob, source))
                    advance(blob.size)
                yield bytes(2 * BLOCK)

            durable.write(path, _gathered(chunks()), size, mode=0o600)
    return size


def restore(path: Path, folder: Path) -> Path:
    """Make a hub of a backup in a new or empty folder, every byte hashed; all of it, or nothing.

    Raises IntegrityError for a file that is none, or not whole; NameInUse for a folder that holds something."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror}", "name a file that adapterhub backup wrote") from None
    with file:
        data = _read_list(file, path)
        index, blobs = _decoded(data, path)
        size, there = _size(data, index, blobs), path.stat().st_size
        if there != size:
            raise IntegrityError(f"{path} has {there} bytes, not the {size} that it lists", _NOT_ONE)
        check_disk(folder, size)
        with durable.new_folder(folder) as out, bar(f"restore {path.name}", size) as advance:
            store, unsynced = Store(out), set[Path]()
            durable.write(out / DATABASE, _content(file, path, DATABASE, index), index.size, mode=0o666)
            for blob in blobs:
                durable.write(store.path(blob.digest), _content(file, path, _name(blob), blob), blob.size, unsynced)
                advance(blob.size)
            if file.read() != bytes(2 * BLOCK):
                raise IntegrityError(f"{path} has something after its end", _NOT_ONE)
            durable.sync(unsynced)
    return folder


def _files(hub: Releases, index: bytes, path: Path) -> list[File]:
    """Every file that this copy of an index lists: not the live one, which may list more by now."""
    from adapterhub.opening import open

    with durable.scratch(path) as folder:
        durable.write_bytes(folder / DATABASE, index)
        files = list(open(folder).index.files())
    return [file for file in files if hub.store.path(file.digest).exists() or expected(hub.index, file)]


def _size(listed: bytes, index: File, blobs: list[File]) -> int:
    """Bytes of the whole file."""
    return sum(BLOCK + _padded(size) for size in (len(listed), index.size, *(b.size for b in blobs))) + 2 * BLOCK


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _name(blob: File) -> str:
    hex_digits = blob.digest.removeprefix("sha256:")
    return f"blobs/sha256/{hex_digits[:2]}/{hex_digits}"


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.GNU_FORMAT)


def _member(name: str, size: int, chunks: Iterator[bytes] | list[bytes]) -> Iterator[bytes]:
    yield _header(name, size)
    yield from chunks
    yield bytes(_padded(size) - size)


def _gathered(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer pieces: a hub may have a million small blobs."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        if len(held) >= durable.CHUNK:
            yield bytes(held)
            held.clear()
    yield bytes(held)


def _read_list(file: BinaryIO, path: Path) -> bytes:
    """The first member. Only its size is believed, and only up to what the file has."""
    header = file.read(BLOCK)
    try:
        size = tarfile.TarInfo.frombuf(header, "utf-8", "strict").size
    except (tarfile.TarError, UnicodeDecodeError):
        size = -1
    if not 0 <= size <= min(LARGEST_LIST, path.stat().st_size) or header != _header(LIST, size):
        raise IntegrityError(f"{path} is not a backup of a hub", "name a file that adapterhub backup wrote")
    return file.read(_padded(size))[:size]


def _decoded(data: bytes, path: Path) -> tuple[File, list[File]]:
    try:
        found = read_json(data, LARGEST_LIST)
        if found["format"] != 1 or canonical(found) != data:
            raise ValueError("it has another format")
        index, *blobs = [File(digest=check_digest(d), size=size) for d, size in (found["index"], *found["blobs"])]
        if any(type(one.size) is not int or not 0 <= one.size < 1 << 50 for one in (index, *blobs)):
            raise ValueError("a size is not a count of bytes")
        digests = [blob.digest for blob in blobs]
        if digests != sorted(set(digests)):
            raise ValueError("its blobs are not in order")
    except (ValueError, TypeError, KeyError, RecursionError, HubError) as error:
        raise IntegrityError(f"{path} lists nothing that we understand: {error}", _NOT_ONE) from None
    return index, blobs


def _content(file: BinaryIO, path: Path, name: str, wanted: File) -> Iterator[bytes]:
    """The bytes of the next member, which must be the one that the list names, hashed as they come."""
    if file.read(BLOCK) != _header(name, wanted.size):
        raise IntegrityError(f"{path} does not have {name} where it should be", _NOT_ONE)

    def chunks() -> Iterator[bytes]:
        left = wanted.size
        while left and (chunk := file.read(min(left, durable.CHUNK))):
            left -= len(chunk)
            yield chunk

    yield from hashed(chunks(), wanted, path)
    if any(file.read(_padded(wanted.size) - wanted.size)):
        raise IntegrityError(f"{path} has something between its files", _NOT_ONE)
