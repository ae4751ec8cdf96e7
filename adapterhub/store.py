"""Blobs by their sha256: `blobs/sha256/ab/<64 hex digits>`. Nothing is visible before it is hashed and on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from adapterhub import durable
from adapterhub.errors import HubError, IntegrityError
from adapterhub.manifest import File, check_digest, digest_of

DATABASE = "hub.db"
"""The file that makes a folder a hub; the index lives in it, the blobs beside it."""
_REPAIR = "install or import the adapter again to mend it; adapterhub verify lists all damage"


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be in a hub."""

    path: Path
    """The file."""
    reason: str
    releases: tuple[str, ...] = ()
    """Those that need it."""

    def __str__(self) -> str:
        needed = f" (needed by {', '.join(self.releases)})" if self.releases else ""
        return f"{self.path}: {self.reason}{needed}"


class Store:
    """The blobs of one hub."""

    def __init__(self, root: Path):
        self.folder = Path(root) / "blobs" / "sha256"

    def path(self, digest: str) -> Path:
        """Where a blob lies, or would. Its bytes are not checked; `read` and `checked` do that."""
        hex_digits = check_digest(digest).removeprefix("sha256:")
        return self.folder / hex_digits[:2] / hex_digits

    def put(self, content: bytes | Path, expected: File | None = None) -> File:
        """Keep these bytes, or a copy of this file. A blob that is there already and sound is not written again.

        Raises IntegrityError when they are not the `expected` ones."""
        file = expected or identify(content)
        path = self.path(file.digest)
        if self._fault(file) is not None:
            chunks = [content] if isinstance(content, bytes) else _chunks(content)
            source = "the bytes given" if isinstance(content, bytes) else content
            durable.write(path, _hashed(chunks, file, source), file.size)
        return file

    def read(self, digest: str) -> bytes:
        """The bytes of a blob. Raises IntegrityError, naming the file, when they are damaged or missing."""
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{path} cannot be read: {error.strerror}", _REPAIR) from None
        if digest_of(data) != digest:
            raise IntegrityError(f"{path} is damaged: its sha256 is another", _REPAIR)
        return data

    def checked(self, file: File) -> Path:
        """Where a blob lies, after hashing it. Raises IntegrityError as `read` does."""
        fault = self._fault(file)
        if fault is not None:
            raise IntegrityError(f"{self.path(file.digest)} {fault}", _REPAIR)
        return self.path(file.digest)

    def verify(self, files: Iterable[File]) -> Iterator[tuple[File, Problem]]:
        """Hash every one of these blobs; a Problem for each that is damaged or missing."""
        for file in files:
            fault = self._fault(file)
            if fault is not None:
                yield file, Problem(self.path(file.digest), fault)

    def remove(self, digest: str) -> None:
        """Remove a blob. Only under the hub's lock."""
        durable.remove(self.path(digest))

    def sweep(self, keep: Collection[str]) -> None:
        """Remove every blob whose digest is not in `keep`, and what killed writers left. Only under the hub's lock."""
        for path in sorted(self.folder.glob("*/*")):
            if f"sha256:{path.name}" not in keep:
                durable.remove(path)

    def _fault(self, file: File) -> str | None:
        """What is wrong with the blob on disk; the length is looked at before anything is hashed."""
        path = self.path(file.digest)
        try:
            size = path.stat().st_size
            if size != file.size:
                return f"is damaged: {size} bytes instead of {file.size}"
            for _ in _hashed(durable.read_chunks(path), file, path):
                pass
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        except IntegrityError:
            return "is damaged: its sha256 is another"
        return None


def identify(content: bytes | Path) -> File:
    """The digest and size that these bytes, or this file's, would be stored under."""
    if isinstance(content, bytes):
        return File(digest=digest_of(content), size=len(content))
    hasher, size = hashlib.sha256(), 0
    for chunk in _chunks(content):
        hasher.update(chunk)
        size += len(chunk)
    return File(digest="sha256:" + hasher.hexdigest(), size=size)


def _chunks(source: Path) -> Iterator[bytes]:
    try:
        yield from durable.read_chunks(source)
    except OSError as error:
        raise HubError(f"{source} cannot be read: {error.strerror}", "check the file and its permissions") from None


def _hashed(chunks: Iterable[bytes], file: File, source: Path | str) -> Iterator[bytes]:
    """The chunks as they come; IntegrityError as soon as they cannot be `file` any more."""
    hasher, size = hashlib.sha256(), 0
    for chunk in chunks:
        hasher.update(chunk)
        size += len(chunk)
        if size > file.size:
            break
        yield chunk
    if size != file.size or "sha256:" + hasher.hexdigest() != file.digest:
        raise IntegrityError(
            f"{source} is not {file.digest} of {file.size} bytes",
            "it was changed on the way; get it again from its source",
        )
