"""The only module that writes files. Everything it writes is there whole or not at all, also after a kill or a power cut.

A file is written beside its target, synced, renamed over it, and the folder is synced. What a killed process leaves
behind ends in `.tmp` and is never read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import DiskFull, HubError, NameInUse, NotFound
from adapterhub.files import platforms
from adapterhub.files.locks import lock

__all__ = ["lock"]
"""What others take from here though it is made elsewhere."""
CHUNK = 1 << 20
TEMPORARY = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.EOPNOTSUPP)

watch: Callable[[str, Path, bytes | Path | None], None] | None = None
"""Told of every step before it is done: "write" (with the bytes), "fsync" (a file or folder), "rename" and "link" (with
where to), "unlink", "commit"; and of "send", a request to another machine. Crash tests count the steps, end the process at one, or raise an OSError in its place."""


def announce(step: str, path: Path, detail: bytes | Path | None = None) -> None:
    """Tell `watch` of a step that is about to be done."""
    if watch is not None:
        watch(step, path, detail)


def write(path: Path, chunks: Iterable[bytes], size: int, unsynced: set[Path] | None = None, mode: int = 0o664) -> None:
    """Write the chunks, `size` bytes in all, to path. What raises while they come leaves the old state.

    unsynced: the folder joins this set instead of being synced at once, for many files in few folders: `sync` it then.
    Raises HubError, with path and bytes needed, when the disk is full, broken or read-only."""
    temporary = _beside(path)
    with _told(path, size):
        make_folder(path.parent, unsynced)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            try:
                for chunk in chunks:
                    _write(handle, temporary, chunk)
                announce("fsync", temporary)
                platforms.sync(handle)
            finally:
                os.close(handle)
            _rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                _unlink(temporary)
            raise
        _settle(path.parent, unsynced)


def write_bytes(path: Path, data: bytes) -> None:
    write(path, [data], len(data))


def write_secret(path: Path, data: bytes) -> None:
    """A file that only its owner can read."""
    write(path, [data], len(data), mode=0o600)


def write_file(path: Path, source: Path) -> None:
    """Copy a file."""
    write(path, read_chunks(source), source.stat().st_size)


def append(path: Path, chunks: Iterable[bytes], size: int) -> None:
    """Add the chunks to a file that is not whole yet (made when missing), for a download that goes on where it stopped.

    What has come stays, whatever ends it; nobody reads the file before its bytes are hashed. size: bytes to come."""
    with _told(path, size):
        make_folder(path.parent)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o664)
        try:
            for chunk in chunks:
                _write(handle, path, chunk)
        finally:
            os.close(handle)


def link(path: Path, source: Path, unsynced: set[Path] | None = None) -> bool:
    """Give a file that never changes a second name; False where that cannot be (another file system, another owner).

    Raises FileExistsError for a name that is taken."""
    state = source.lstat()
    if not stat.S_ISREG(state.st_mode) or not platforms.is_mine(state) or state.st_mode & 0o022:
        return False  # somebody else could write to it later, or it is a link to what may change
    with _told(path, 0):
        make_folder(path.parent, unsynced)
        announce("link", source, path)
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        with _told(path, 0):
            raise
    _settle(path.parent, unsynced)
    return True


def move(source: Path, path: Path) -> None:
    """Sync a file written by `append` and rename it, durably. On one file system."""
    with _told(path, 0):
        make_folder(path.parent)
        _sync(source)
        _rename(source, path)
        _sync(path.parent)


def sync(folders: Iterable[Path]) -> None:
    """Sync folders that `write` and `link` were told to leave."""
    for folder in sorted(folders):
        with _told(folder, 0):
            _sync(folder)


def open_plain(path: Path) -> BinaryIO:
    """Open a file to be read. Raises OSError, without waiting, for a pipe, a device or whatever else has no size."""
    handle = os.open(path, platforms.READ)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return os.fdopen(handle, "rb")


def read_plain(path: Path, most: int) -> bytes:
    """Read a plain file, `most` bytes of it at most. Raises OSError as `open_plain` does."""
    with open_plain(path) as file:
        return file.read(most)


def read_chunks(path: Path, plain: bool = False) -> Iterator[bytes]:
    """Yield a file's bytes. plain: as `open_plain` opens it, for a file of a stranger's."""
    with open_plain(path) if plain else path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def make_folder(path: Path, unsynced: set[Path] | None = None) -> None:
    """The folder and those above it, durably (unsynced: as for `write`)."""
    if (unsynced and path in unsynced) or path.is_dir():
        return
    with _told(path, 0):
        make_folder(path.parent, unsynced)
        try:
            os.mkdir(path)
        except FileExistsError:  # fine when another process was faster, not when it is a file
            if not path.is_dir():
                raise
        _settle(path.parent, unsynced)


def make_private(path: Path) -> None:
    """The folder, which nobody but its owner may look into from now on."""
    make_folder(path)
    with _told(path, 0):
        os.chmod(path, 0o700)


def remove(path: Path, unsynced: set[Path] | None = None) -> None:
    """Remove a file; one that is gone already is fine."""
    with _told(path, 0), suppress(FileNotFoundError):
        _unlink(path)
        _settle(path.parent, unsynced)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it, following no link; what cannot be removed stays."""
    for below, folders, files in os.walk(path, topdown=False):
        with suppress(OSError):
            for name in files:
                _unlink(Path(below, name))
        for name in folders:
            inner = Path(below, name)
            with suppress(OSError):
                _unlink(inner) if inner.is_symlink() else os.rmdir(inner)
    with suppress(OSError):
        os.rmdir(path)


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
        raise NameInUse(f"{path} is there already", "name a folder that is empty or does not exist yet")
    path = path.absolute()  # "." has no name to put a temporary folder beside
    temporary = _beside(path)
    try:
        make_folder(temporary)
        yield temporary
        with _told(path, 0):
            _sync(temporary)
            _rename(temporary, path)
            _sync(path.parent)
    except BaseException:
        remove_tree(temporary)
        raise


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A folder beside `path` to make a file in, before it is moved there; it vanishes with what is left in it."""
    folder = _beside(path)
    try:
        make_folder(folder)
        yield folder
    finally:
        remove_tree(folder)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{TEMPORARY}")


def _write(handle: int, path: Path, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        announce("write", path, view)
        view = view[os.write(handle, view) :]


def _rename(source: Path, path: Path) -> None:
    announce("rename", source, path)
    os.replace(source, path)


def _unlink(path: Path) -> None:
    announce("unlink", path)
    os.unlink(path)


def _settle(folder: Path, unsynced: set[Path] | None) -> None:
    if unsynced is None:
        _sync(folder)
    else:
        unsynced.add(folder)


def _sync(path: Path) -> None:
    announce("fsync", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        platforms.sync(handle)
    finally:
        os.close(handle)


@contextmanager
def _told(path: Path, size: int) -> Iterator[None]:
    """The operating system's refusal in the user's words."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"cannot write {path}: no space left, {size} bytes needed",
                "free some space and run it again; nothing was changed",
            ) from None
        raise HubError(
            f"cannot write {path} ({size} bytes): {error.strerror or error}",
            "check that the folder is writable and the disk is sound; nothing was changed",
        ) from None
