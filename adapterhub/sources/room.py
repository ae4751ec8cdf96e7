"""Room for what is about to come: looked at before the first byte is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from adapterhub.errors import DiskFull, HubError, IntegrityError
from adapterhub.spec.manifest import File, Release
from adapterhub.store.blobs import Store


def announced(store: Store, releases: Iterable[Release]) -> int:
    """Bytes that releases announce, of the files that a store lacks. A large tensor that it has already counts all the same
    while the list of its file's parts is not here."""
    files = {file.digest: file for release in releases for file in release.manifest.needs}
    return sum(blob.size for file in files.values() for blob in _lacking(store, file))


def check_cap(size: int, most: int | None, what: str) -> None:
    """Raise HubError when `what` announces more bytes than the user allows (None: any number)."""
    if most is not None and size > most:
        raise HubError(
            f"{what}: {shown(size)} would come, and {shown(most)} are allowed",
            "allow more with --max-bytes, or ask for less; nothing was fetched",
        )


def check_disk(folder: Path, size: int) -> None:
    """Raise DiskFull when the file system of a folder has less than `size` bytes left. The folder need not be there yet."""
    there = next((each for each in (folder, *folder.absolute().parents) if each.is_dir()), None)
    free = shutil.disk_usage(there).free if there else size
    if size > free:
        raise DiskFull(
            f"{shown(size)} are needed in {folder}, and {shown(free)} are free",
            "make room on that disk: adapterhub gc and adapterhub cache --clean say what they would take",
        )


def shown(size: int) -> str:
    """Bytes as a person reads them."""
    return next((f"{size / unit:.1f} {name}" for name, unit in _UNITS if size >= unit), f"{size} bytes")


_UNITS = [("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)]


def _lacking(store: Store, file: File) -> Collection[File]:
    try:
        blobs = store.blobs(file)
    except IntegrityError:  # the list of its parts is not here
        return [file]
    return [blob for blob in blobs if store.fault(blob, hashing=False) is not None]
