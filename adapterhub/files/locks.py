"""The operating system's lock on a file, and who holds it: whoever waits longer than a second is told."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub.errors import HubError
from adapterhub.files import platforms

PATIENCE = 1.0
"""Seconds of waiting of which nothing is said."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_WORD = re.compile(r"[a-z][a-z0-9-]{0,30}")

tell: Callable[[str], None] | None = None
"""Called, from another thread, with one line when a lock takes longer than `PATIENCE`. The command line prints it to stderr, on
a terminal or not; a library says nothing unless a program asks for it here."""


@contextmanager
def lock(path: Path, shared: bool = False, wait: bool = True, create: bool = True) -> Iterator[bool]:
    """Hold the operating system's lock on a file: alone, or with others who share it. create: make it when it is missing;
    else a missing one needs no lock.

    It ends with the process, however that ends. Without `wait` yields False, and holds nothing, when it is taken. Raises
    HubError where the file system has no locks: without them nothing is safe."""
    try:
        handle = _open(path, shared, create)
    except OSError as error:
        raise HubError(
            f"cannot lock {path}: {error.strerror}", "check that the folder is writable and the disk is not full"
        ) from None
    if handle is None:  # a store that nobody can write to needs no lock to be read
        yield True
        return
    try:
        yield _take(handle, path, shared, wait)
    finally:
        os.close(handle)


def _take(handle: int, path: Path, shared: bool, wait: bool) -> bool:
    try:
        if platforms.flock(handle, shared, wait=False):
            return True
        if wait:
            with _telling(path):
                platforms.flock(handle, shared, wait=True)  # Ctrl-C ends it
        return wait
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise HubError(f"cannot lock {path}: {error.strerror}", "run it again") from None
        raise HubError(
            f"{path}: this file system has no locks ({error.strerror})",
            "two programs at once could damage the hub: move it to a local disk, or mount the share with locks",
        ) from None


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Tell who is waited for, once, if the block takes long."""
    said = tell
    if said is None:
        yield
        return
    timer = threading.Timer(PATIENCE, lambda: said(f"waiting for {path}, which {_held_by(path)}"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _held_by(path: Path) -> str:
    found = [f"{pid} ({command})" if (command := _command(pid)) else str(pid) for pid in platforms.lock_holders(path)]
    if not found:
        return "another program holds"
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"process {', '.join(found[:3])}{more} {'holds' if len(found) == 1 else 'hold'}"


def _command(pid: int) -> str:
    """Which command of ours a process runs, or which program it is: no argument of it, which could be a secret."""
    words = platforms.command_line(pid)
    if not words:
        return ""
    for place, word in enumerate(words[:4]):
        if Path(word).name == "adapterhub" or (word == "adapterhub" and words[place - 1] == "-m"):
            command = words[place + 1] if len(words) > place + 1 else ""
            return f"adapterhub {command}" if _WORD.fullmatch(command) else "adapterhub"
    name = Path(words[0]).name[:40]
    return name if name.isprintable() else ""


def _open(path: Path, shared: bool, create: bool) -> int | None:
    try:
        if create:
            return os.open(path, os.O_RDWR | os.O_CREAT | platforms.NO_LINK, 0o664)
    except OSError as error:
        if not shared or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    try:
        return os.open(path, platforms.READ | platforms.NO_LINK)
    except OSError:
        return None
