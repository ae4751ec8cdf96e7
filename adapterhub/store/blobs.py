"""Blobs by their sha256: `blobs/sha256/ab/<64 hex digits>`. Nothing is visible before it is hashed and on disk."""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from adapterhub.errors import HubError, IntegrityError
from adapterhub.files import durable
from adapterhub.files.pool import WORKERS, each
from adapterhub.files.safetensors_header import extent
from adapterhub.spec.digest import check_digest, digest_of
from adapterhub.spec.manifest import File
from adapterhub.store import segments as parts

DATABASE = "hub.db"
"""The file that makes a folder a hub; the index lives in it, the blobs beside it."""
_BLOB = re.compile("[0-9a-f]{64}")
_REPAIR = "adapterhub repair mends it from where it came; adapterhub verify lists all damage"


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
        self.root = Path(root)
        self.folder = self.root / "blobs" / "sha256"
        self.came: list[File] = []
        """Blobs that were written through this object, or were about to be."""

    # --- locks -------------------------------------------------------------------------------------------------

    def shared(self) -> AbstractContextManager[bool]:
        """Held while blobs are put or read: nothing is taken away meanwhile. Many may hold it."""
        return durable.lock(self.root / "hub.lock", shared=True)

    def alone(self, wait: bool = True) -> AbstractContextManager[bool]:
        """Held while blobs are taken away."""
        return durable.lock(self.root / "hub.lock", wait=wait)

    def prepare(self) -> None:
        """Make the folders that blobs lie in, so that no install has to."""
        unsynced: set[Path] = set()
        for first in range(256):
            durable.make_folder(self.folder / f"{first:02x}", unsynced)
        durable.sync(unsynced)

    # --- putting -----------------------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where a blob lies, or would. Its bytes are not checked; `read` does that."""
        hex_digits = check_digest(digest).removeprefix("sha256:")
        return Path(f"{self.folder}/{hex_digits[:2]}/{hex_digits}")

    def put(self, content: bytes | Path) -> File:
        """Keep these bytes, or a copy of this file, as one blob. One that is there already and sound is not written again."""
        file = identify(content)
        chunks = [content] if isinstance(content, bytes) else _chunks(content)
        self.take(file, chunks, "the bytes given" if isinstance(content, bytes) else content)
        return file

    def put_tensors(self, content: bytes | Path) -> File:
        """Keep a safetensors file: in parts, so that a large tensor which is here already takes no room again.

        Raises what `safetensors_header.read_layout` raises."""
        whole = content if isinstance(content, bytes) else b"".join(_chunks(content))
        cuts = parts.cuts(whole)
        if len(cuts) == 1:
            return self.put(content)
        view = memoryview(whole)
        found = each(lambda cut: identify(view[slice(*cut)]), cuts)
        blobs = dict(zip(found, cuts, strict=True))
        self.fill(blobs, lambda blob, folders: self.take(blob, [view[slice(*blobs[blob])]], "the tensors", folders))
        return File(digest=self.put(parts.encode(found)).digest, size=len(whole), parts=True)

    def fill(self, blobs: Iterable[File], bring: Callable[[File, set[Path]], None]) -> None:
        """Let `bring(blob, folders)` put each of these blobs, several side by side; then sync the folders."""
        folders: set[Path] = set()
        each(lambda blob: bring(blob, folders), blobs)
        durable.sync(folders)

    def take(self, blob: File, chunks: Iterable[bytes], source: Path | str, unsynced: set[Path] | None = None) -> None:
        """Keep a blob whose bytes come from anywhere. Raises IntegrityError, and keeps nothing, when they are others."""
        if self.fault(blob) is not None:
            self.came.append(blob)
            durable.write(self.path(blob.digest), hashed(chunks, blob, source), blob.size, unsynced)

    def adopt(self, blobs: Mapping[File, Path], advance: Callable[[int], None] = lambda size: None) -> None:
        """Keep blobs that lie in another store, each as a second name of the same file where the file system can. `advance` is
        told of the bytes of each.

        While some are hashed, side by side, others that were get their names. Raises IntegrityError for other bytes."""
        folders: set[Path] = set()
        with ThreadPoolExecutor(WORKERS) as pool:
            checks = pool.map(lambda place: deque(hashed(_foreign(place[1]), *place), maxlen=0), blobs.items())
            for (blob, path), _ in zip(blobs.items(), checks, strict=True):
                advance(blob.size)
                try:
                    if durable.link(self.path(blob.digest), path, folders):
                        self.came.append(blob)
                        continue
                except FileExistsError:
                    pass
                self.take(blob, _foreign(path), path, folders)  # a copy; nothing, when it is there already and sound
        durable.sync(folders)

    # --- reading -----------------------------------------------------------------------------------------------

    def parts(self, file: File) -> list[File]:
        """The blobs that the file's bytes are made of, in order. Raises IntegrityError for a list that is damaged."""
        return parts.decode(self._blob(file.digest, parts.LARGEST_LIST), file) if file.parts else [file]

    def blobs(self, file: File) -> list[File]:
        """Every blob behind a file: its parts and the list of them."""
        if not file.parts:
            return [file]
        listed = self._blob(file.digest, parts.LARGEST_LIST)
        return [File(digest=file.digest, size=len(listed)), *parts.decode(listed, file)]

    def read(self, file: File) -> bytes:
        """The file's bytes. Raises IntegrityError, naming the blob, when they are damaged or missing."""
        found = self.parts(file)
        if len(found) == 1:
            return self._blob(found[0].digest)
        for blob in found:  # before memory is taken for what they say they are
            if wrong := self.fault(blob, hashing=False):
                raise IntegrityError(f"{self.path(blob.digest)} {wrong}", _REPAIR)
        whole = bytearray(file.size)
        ends = list(accumulate(blob.size for blob in found))

        def copy(place: tuple[File, int]) -> None:
            blob, end = place
            data = self._blob(blob.digest)
            if len(data) != blob.size:
                raise IntegrityError(f"{self.path(blob.digest)} has {len(data)} bytes, not {blob.size}", _REPAIR)
            whole[end - blob.size : end] = data

        each(copy, zip(found, ends, strict=True))
        return bytes(whole)

    def header(self, file: File) -> bytes:
        """The beginning of a tensor file: its header, for `safetensors_header.read_header(header, file.size)`."""
        start = b""
        for blob in self.parts(file):
            path = self.path(blob.digest)
            try:
                if path.stat().st_size != blob.size:
                    raise IntegrityError(f"{path} is cut", _REPAIR)
                with durable.open_plain(path) as data:
                    start += data.read(9 - len(start)) if len(start) < 9 else b""
                    start += data.read(max(extent(start) - len(start), 0))
            except OSError as error:
                raise IntegrityError(f"{path} cannot be read: {error.strerror}", _REPAIR) from None
            if len(start) >= 9 and len(start) >= extent(start):
                break
        return start

    def listed(self) -> Iterator[Path]:
        """Every blob that is here, needed or not, by its name."""
        for folder in sorted(self.folder.glob("??")):
            yield from (path for path in sorted(folder.glob("*")) if _BLOB.fullmatch(path.name) and path.is_file())

    # --- looking after -----------------------------------------------------------------------------------------

    def verify(
        self, files: Iterable[File], hashing: Callable[[File], bool] = lambda blob: True
    ) -> Iterator[tuple[File, Problem]]:
        """Look at every blob of these files: its size, and where `hashing` says so its bytes. A Problem for each that is
        damaged or missing."""

        def fault(blob: File) -> str | None:
            return self.fault(blob, hashing(blob))

        for file in files:
            try:
                found = self.blobs(file)
            except IntegrityError:
                yield file, Problem(self.path(file.digest), self._list_fault(file))
                continue
            for blob, problem in zip(found, each(fault, found), strict=True):
                if problem is not None:
                    yield file, Problem(self.path(blob.digest), problem)

    def _list_fault(self, file: File) -> str:
        """Why a list of parts does not say what a file is made of."""
        path = self.path(file.digest)
        size = path.stat().st_size if path.is_file() else 0
        return self.fault(File(digest=file.digest, size=size)) or "is no list of the parts of its file"

    def remove(self, digests: Iterable[str]) -> None:
        """Remove blobs. Only while `alone`."""
        for digest in digests:
            durable.remove(self.path(digest))

    def stray(self, needed: Iterable[File]) -> Iterator[Path]:
        """What no needed file is made of, and what killed writers left. Only while `alone`.

        Raises IntegrityError when a list of parts is damaged: then nobody knows what is needed."""
        keep = {bytes.fromhex(blob.digest[7:]) for file in needed for blob in self.blobs(file)}  # of a million, 100 MB
        for folder in sorted(self.folder.glob("*")):
            for name in sorted(os.listdir(folder)):
                if not _BLOB.fullmatch(name) or bytes.fromhex(name) not in keep:
                    yield folder / name

    def fault(self, blob: File, hashing: bool = True) -> str | None:
        """What is wrong with a blob on disk; the length is looked at before anything is hashed."""
        path = self.path(blob.digest)
        try:
            size = path.stat().st_size
            if blob.size != size:
                return f"is damaged: {size} bytes instead of {blob.size}"
            for _ in hashed(durable.read_chunks(path), blob, path) if hashing else ():
                pass
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        except IntegrityError:
            return "is damaged: its sha256 is another"
        return None

    def _blob(self, digest: str, largest: int = -1) -> bytes:
        path = self.path(digest)
        try:
            with durable.open_plain(path) as file:
                data = file.read(largest)
        except FileNotFoundError:
            raise IntegrityError(f"{path} is missing", _REPAIR) from None
        except OSError as error:
            raise IntegrityError(f"{path} cannot be read: {error.strerror}", _REPAIR) from None
        if digest_of(data) != digest:
            raise IntegrityError(f"{path} is damaged: its sha256 is another", _REPAIR)
        return data


def identify(content: bytes | memoryview | Path) -> File:
    """The digest and size that these bytes, or this file's, would be stored under."""
    if not isinstance(content, Path):
        return File(digest=digest_of(content), size=len(content))
    hasher, size = hashlib.sha256(), 0
    for chunk in _chunks(content):
        hasher.update(chunk)
        size += len(chunk)
    return File(digest="sha256:" + hasher.hexdigest(), size=size)


def hashed(chunks: Iterable[bytes], blob: File, source: Path | str) -> Iterator[bytes]:
    """The chunks as they come; IntegrityError as soon as they cannot be `blob` any more."""
    hasher, size = hashlib.sha256(), 0
    for chunk in chunks:
        hasher.update(chunk)
        size += len(chunk)
        if size > blob.size:
            break
        yield chunk
    if size != blob.size or "sha256:" + hasher.hexdigest() != blob.digest:
        raise IntegrityError(
            f"{source} is not {blob.digest} of {blob.size} bytes",
            "it was changed on the way; get it again from its source",
        )


def _foreign(source: Path) -> Iterator[bytes]:
    """The bytes of a file in somebody else's folder, which may be a pipe by now."""
    return _chunks(source, plain=True)


def _chunks(source: Path, plain: bool = False) -> Iterator[bytes]:
    try:
        yield from durable.read_chunks(source, plain)
    except OSError as error:
        raise HubError(f"{source} cannot be read: {error.strerror}", "check the file and its permissions") from None
