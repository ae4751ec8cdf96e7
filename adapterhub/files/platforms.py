"""What differs between operating systems, in one place.

adapterhub runs on Linux. macOS is meant to work: the tests do not run there. Windows has neither these locks nor these links,
so adapterhub ends there before it does anything. What a system lacks of the limits on memory and computing is named here
with what holds instead.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

if os.name != "posix":
    _WHY = "adapterhub runs on Linux and macOS, not on Windows: use it inside WSL"
    if os.path.basename(sys.argv[0]).partition(".")[0] in ("adapterhub", "-m"):
        raise SystemExit(f"error: {_WHY}")
    raise ImportError(_WHY)

import fcntl
import resource

READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
"""To open a file that may be anything: a pipe or a device does not keep us waiting."""
NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC
"""To open a file of ours: a link in its place is an error."""


def flock(handle: int, shared: bool, wait: bool) -> bool:
    """Take the system's lock on an open file; it ends with the process. Return False when it is taken and `wait` is not.

    Raises OSError where the file system has no locks."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def sync(handle: int) -> None:
    """Bring an open file's bytes, or a folder's names, onto the disk. On macOS fsync leaves them in the drive's cache."""
    if sys.platform == "darwin":
        with suppress(OSError):  # a file system that does not know it
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def is_mine(state: os.stat_result) -> bool:
    """Return whether a file belongs to the user whose process this is."""
    return state.st_uid == os.geteuid()


def lock_holders(path: Path) -> list[int]:
    """Return the processes that hold a lock on a file; [] where the system does not say (only Linux does)."""
    try:
        state = path.stat()
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    place = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
    fields = [line.split() for line in lines]
    return sorted({int(f[4]) for f in fields if len(f) > 5 and f[1] == "FLOCK" and f[5] == place and f[4].isdigit()})


def command_line(pid: int) -> list[str]:
    """Return the words that a process was started with; [] where the system does not say."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(4096).decode(errors="replace").split("\0")
    except OSError:
        return []


def limit_memory(more: int) -> None:
    """Let this process take so many more bytes than it has. macOS does not hold it: the caller needs a limit of time as well."""
    with suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, taken + more)


def limit_computing(seconds: int) -> None:
    """Let this process compute for so many more seconds, even when whoever waits for it was killed."""
    with suppress(OSError, ValueError):
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + seconds)


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most if hard < 0 else min(most, hard), hard))
