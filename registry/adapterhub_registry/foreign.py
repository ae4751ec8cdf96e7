"""A SQLite file that a stranger made, opened to be read: it cannot write, run long or answer with more than fits.

SQLite itself is robust against damaged files; what it does on purpose is what hurts here. A journal beside the file is
rolled back, and a crafted one names any file of the user's, which is then deleted: `mode=ro` refuses a journal (`immutable` would
read on, without locks). A view takes the place of a table, and never ends. A write-ahead log makes files.

Of this `check_journal` is for the user's own hub, too.
"""

from __future__ import annotations

import shlex
import sqlite3
import stat
import time
from contextlib import suppress
from os import SEEK_END
from pathlib import Path

from adapterhub.errors import UnsafeFile
from adapterhub.files.durable import open_plain

SECONDS = 5.0
"""That one look at the file may take."""
LARGEST_VALUE = 16 << 20
"""Bytes of one value; a manifest has half of them at most."""
LARGEST_ANSWER = 64 << 20
"""Bytes of text that one look at the file may return."""
_STEPS = 10_000
"""SQLite's virtual machine steps between two looks at the clock."""
_SUPER = bytes.fromhex("d9d505f920a163d7")
"""What a journal ends with that names another file."""
_HINT = "ask who made it for a bundle instead"


def connect(path: Path, patience: float) -> sqlite3.Connection:
    """Open a stranger's file to read it once. patience: seconds to wait for its lock.

    Raises UnsafeFile for a file that is not a plain SQLite file of tables and indexes in rollback mode."""
    _check_plain(path)
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=patience, isolation_level=None)
    try:
        end = time.monotonic() + SECONDS
        connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_VALUE)
        connection.text_factory = _Budget(path)
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "query_only = ON"):
            connection.execute(f"PRAGMA {pragma}")
        for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master"):
            if kind not in ("table", "index") or "virtual" in (sql or "").lower().split()[:3]:
                raise UnsafeFile(f"{path} holds the {kind} {name[:80]!r}, which no hub has", _HINT)
    except BaseException:
        connection.close()
        raise
    return connection


def check_journal(path: Path) -> None:
    """Raise UnsafeFile when the journal of a database names another file: SQLite would delete that one after it has rolled
    back. SQLite writes such journals for transactions over several files, and a hub is one."""
    journal = path.with_name(f"{path.name}-journal")
    try:
        with open_plain(journal) as file:
            file.seek(-min(8, file.seek(0, SEEK_END)), SEEK_END)
            bad = file.read() == _SUPER or journal.is_symlink()
    except FileNotFoundError:
        return
    except OSError:
        bad = True
    if bad:
        raise UnsafeFile(
            f"{journal} would make SQLite delete another file", "it is none of adapterhub's: look at it, then remove it"
        )


def refusal(path: Path, reason: str) -> UnsafeFile | None:
    """Return what SQLite's refusal of a stranger's file means, if it means something of its own."""
    if "interrupted" in reason:
        return UnsafeFile(f"{path} does not answer within {SECONDS:.0f} seconds", _HINT)
    if "too big" in reason:
        return UnsafeFile(f"{path} holds a value of more than {LARGEST_VALUE >> 20} MiB", _HINT)
    if "readonly" in reason or "unable to open" in reason:
        return UnsafeFile(
            f"{path} was left in the middle of a change, or is made to look so",
            f"if it is yours, bring it in order first: cd {shlex.quote(str(path.parent))} && adapterhub verify",
        )
    return None


def _check_plain(path: Path) -> None:
    """A pipe in the place of a file would keep us waiting, a link would lead elsewhere."""
    for beside in (path, *(path.with_name(f"{path.name}-{end}") for end in ("journal", "wal", "shm"))):
        with suppress(FileNotFoundError):
            if not stat.S_ISREG((path.stat() if beside == path else beside.lstat()).st_mode):
                raise UnsafeFile(f"{beside} is not a plain file", _HINT)
    with open_plain(path) as file:
        head = file.read(20)
    if head[18:20] == b"\2\2":
        raise UnsafeFile(f"{path} keeps a write-ahead log, which no hub does", _HINT)


class _Budget:
    """Decode the texts that one look returns, until they are too many."""

    def __init__(self, path: Path):
        self._path, self._left = path, LARGEST_ANSWER

    def __call__(self, data: bytes) -> str:
        self._left -= len(data) + 64
        if self._left < 0:
            raise UnsafeFile(f"{self._path} answers with more than {LARGEST_ANSWER >> 20} MiB", _HINT)
        return data.decode()
