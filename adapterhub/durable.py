"""The only module that writes files. Everything it writes is there whole or not at all, also after a kill or a power cut.

A file is written beside its target, synced, renamed over it, and the folder is synced. What a killed process leaves
behind ends in `.tmp` and is never read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub.errors import HubError, NameInUse, NotFound

CHUNK = 1 << 20
TEMPORARY = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(path: Path, chunks: Iterable[bytes], size: int) -> None:
    """Write the chunks, `size` bytes in all, to path. What raises while they come leaves the old state.

    Raises HubError, with path and bytes needed, when the disk is full, broken or read-only."""
    temporary = _beside(path)
    with _told(path, size):
        make_folder(path.parent)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                for chunk in chunks:
                    view = memoryview(chunk)
                    while view:
                        view = view[os.write(handle, view) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    write(path, [data], len(data))


def write_file(path: Path, source: Path) -> None:
    """Copy a file."""
    write(path, read_chunks(source), source.stat().st_size)


def read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def make_folder(path: Path) -> None:
    """The folder and those above it, durably."""
    if path.is_dir():
        return
    with _told(path, 0):
        make_folder(path.parent)
        try:
            os.mkdir(path)
        except FileExistsError:  # fine when another process was faster, not when it is a file
            if not path.is_dir():
                raise
        _sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file; one that is gone already is fine."""
    with _told(path, 0), suppress(FileNotFoundError):
        os.unlink(path)
        _sync(path.parent)


def user_path(text: str | Path) -> Path:
    """A path as a user writes it: `~` is their home. Raises NotFound for the home of nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise NotFound(f"there is no such home: {text}", "write the path out") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    Raises NameInUse when path is there already (an empty folder is fine)."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise NameInUse(f"{path} is there already", "name a folder that does not exist yet")
    path = path.absolute()  # "." has no name to put a temporary folder beside
    temporary = _beside(path)
    try:
        make_folder(temporary)
        yield temporary
        with _told(path, 0):
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the operating system's lock on a file (made when missing); waits for other processes and threads.

    It ends with the process, however that ends."""
    with _told(path, 0):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{TEMPORARY}")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _told(path: Path, size: int) -> Iterator[None]:
    """The operating system's refusal in the user's words."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise HubError(
                f"cannot write {path}: no space left, {size} bytes needed",
                "free some space and run it again; nothing was changed",
            ) from None
        raise HubError(
            f"cannot write {path} ({size} bytes): {error.strerror or error}",
            "check that the folder is writable and the disk is sound; nothing was changed",
        ) from None
