"""One database as SQLAlchemy sees it: connections, transactions, and its refusals in the user's words.

A hub's is a SQLite file. A registry may use any other that SQLAlchemy reaches, by its URL.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from adapterhub.errors import DiskFull, HubError, IntegrityError, UsageError
from adapterhub.files import durable
from adapterhub_registry.foreign import check_journal, refusal
from adapterhub_registry.foreign import connect as connect_foreign

PATIENCE = 60
"""Seconds to wait for another process's transaction."""


class Engine:
    """Transactions on the SQLite file at `path`, or on the database at `url`. foreign: the file is a stranger's, to read."""

    def __init__(self, path: Path, create: bool, url: str | None = None, foreign: bool = False):
        self.path: Path | str = path
        self.sqlite = url is None
        self.foreign = foreign
        if url is None:
            uri = f"{path.resolve().as_uri()}?mode={'rwc' if create else 'rw'}"
            # No pool: nothing stays open between two calls, so a fork or a removed folder cannot hurt.
            self._engine = create_engine(
                "sqlite://",
                creator=lambda: connect_foreign(path, PATIENCE) if foreign else _connect(uri, path),
                poolclass=NullPool,
                skip_autocommit_rollback=True,
            )
            event.listen(self._engine, "begin", _begin)
        else:
            try:
                self.path = make_url(url).render_as_string(hide_password=True)
                self._engine = create_engine(url, pool_pre_ping=True)
            except (ArgumentError, NoSuchModuleError, ImportError) as error:
                raise UsageError(
                    f"no database at {self.path}: {error}",
                    "write postgresql+psycopg://user@host/name, and install its driver",
                ) from None
        event.listen(self._engine, "commit", self._announce)
        self._writer = self._engine.execution_options(writes=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._told(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: all of it, or nothing."""
        with self._told(), self._writer.begin() as connection:
            if not self.sqlite and inspect(connection).has_table("state"):  # one writer at a time, as SQLite has it
                connection.execute(text("LOCK TABLE state IN EXCLUSIVE MODE"))
            yield connection

    def tables(self, connection: Connection) -> set[str]:
        """The names of the tables there."""
        if self.sqlite:
            return set(connection.scalars(text("SELECT name FROM sqlite_master WHERE type = 'table'")))
        return set(inspect(connection).get_table_names())

    def faults(self, connection: Connection) -> list[str]:
        """What the database itself finds wrong; others than SQLite look after themselves."""
        if not self.sqlite:
            return []
        found = [line for (line,) in connection.execute(text("PRAGMA integrity_check")) if line != "ok"]
        for table, *_ in connection.execute(text("PRAGMA foreign_key_check")):
            found.append(f"a row of the table {table} names a release that is not there")
        return found

    def copy(self, connection: Connection) -> bytes:
        """The SQLite file as this transaction sees it."""
        if not self.sqlite:
            raise UsageError(f"{self.path} is not a file of the hub", "copy it with its own tool (pg_dump)")
        connection.execute(text("SELECT count(*) FROM sqlite_master"))  # what is read from here on is one state
        return connection.connection.driver_connection.serialize()

    def _announce(self, connection: Connection) -> None:
        if connection.get_execution_options().get("writes", False):
            durable.announce("commit", Path(self.path))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise IntegrityError(f"{self.path} holds a text that is none: {error}", "restore it from a copy") from None
        except DBAPIError as error:
            reason = str(error.orig)
            if self.foreign and (refused := refusal(Path(self.path), reason)):
                raise refused from None
            if any(word in reason for word in ("not a database", "malformed", "decode")):
                raise IntegrityError(
                    f"{self.path} is no sound database: {reason}", "move it away, or restore it from a copy"
                ) from None
            hints = {
                "full": "free some space and run it again; nothing was changed",
                "locked": "another program holds it; run the command again when that has ended",
                "readonly": "check that the file and its folder are writable; nothing was changed",
            }
            hint = next((hint for word, hint in hints.items() if word in reason), "nothing was changed")
            kind = DiskFull if "full" in reason else HubError
            raise kind(f"{self.path}: {reason}", hint) from None


def _connect(uri: str, path: Path) -> sqlite3.Connection:
    check_journal(path)
    # isolation_level None: we say BEGIN ourselves (see _begin). The rollback journal, because in WAL mode SQLite before
    # 3.51.3 can lose committed writes; EXTRA also syncs the folder, so that no commit is undone by a power cut after
    # `remove` has gone on to the blobs.
    connection = sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None)
    for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "foreign_keys = ON", "journal_mode = DELETE"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("PRAGMA synchronous = EXTRA")
    return connection


def _begin(connection: Connection) -> None:
    """Who will write takes the write lock at once: a lock taken midway could fail after others have written."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
