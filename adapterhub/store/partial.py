"""A blob that comes in pieces: what has come stays on disk, so that a broken transfer goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from adapterhub.errors import DiskFull, IntegrityError
from adapterhub.files import durable
from adapterhub.spec.manifest import File
from adapterhub.store.blobs import Store, hashed


class PartialBlob:
    """One blob on its way into a store: `incoming/<hex>.part`. Nobody sees it before all of it is there and hashed."""

    def __init__(self, store: Store, blob: File):
        self.store, self.blob = store, blob
        self.path = store.root / "incoming" / f"{store.path(blob.digest).name}.part"

    @contextmanager
    def held(self, wait: bool = True) -> Iterator[bool]:
        """Alone with it, in this process and among others; False when another is at it and `wait` is not."""
        durable.make_folder(self.path.parent)
        with durable.lock(self.path.with_suffix(".lock"), wait=wait) as mine:
            yield mine

    @property
    def offset(self) -> int:
        """Bytes that have come."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, chunks: Iterable[bytes]) -> None:
        """Take more bytes; never more than the blob has. What came before an error stays, unless that is DiskFull: a part that
        cannot become whole only takes the room that others need."""
        left = self.blob.size - self.offset

        def counted() -> Iterator[bytes]:
            nonlocal left
            for chunk in chunks:
                if len(chunk) > left:
                    raise IntegrityError(f"{self.blob.digest} has more than {self.blob.size} bytes", "get it again")
                left -= len(chunk)
                yield chunk

        try:
            durable.append(self.path, counted(), left)
        except DiskFull:
            self.discard()
            raise

    def finish(self) -> None:
        """Hash all of it and make it a blob. Raises IntegrityError, and throws it away, when it is not."""
        try:
            for _ in hashed(durable.read_chunks(self.path), self.blob, self.blob.digest):
                pass
        except IntegrityError:
            self.discard()
            raise
        self.store.came.append(self.blob)
        durable.move(self.path, self.store.path(self.blob.digest))

    def discard(self) -> None:
        durable.remove(self.path)
