"""`Database`: the index of a hub in one SQLite file, through SQLAlchemy Core."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Select, Table, create_engine, delete, event, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from adapterhub.errors import HubError, IntegrityError, NameInUse, NotFound, UsageError
from adapterhub.index import Row, kind, newest_first
from adapterhub.manifest import File, Manifest, Release, check_version, digest_of
from adapterhub_registry import tables
from adapterhub_registry.tables import blobs, parents, releases, tags

PATIENCE = 60
"""Seconds to wait for another process's transaction."""


class Database:
    """An `adapterhub.index.Index` over the SQLite file at `path`, which is made when `create` says so.

    An older schema is brought up to date. An empty file is what a process killed while it made the hub leaves: with
    `create` it is filled, without it the hub's contents are lost. Raises IntegrityError for that, HubError for a file
    that is no such database, or a newer one."""

    def __init__(self, path: Path, create: bool = False):
        self.path = Path(path)
        mode = "rwc" if create else "rw"
        uri = f"{self.path.resolve().as_uri()}?mode={mode}"
        # No pool: nothing stays open between two calls, so a fork or a removed folder cannot hurt.
        self._engine = create_engine(
            "sqlite://", creator=lambda: _connect(uri), poolclass=NullPool, skip_autocommit_rollback=True
        )
        event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(writes=True)
        version = self._version()
        if version is None and not create:
            raise IntegrityError(
                f"{self.path} is empty: it lists nothing",
                "restore it from a copy; to begin anew, move it and the blobs away, then adapterhub init",
            )
        if version != tables.HEAD:
            from adapterhub_registry.migrate import upgrade

            with self._write() as connection:
                upgrade(connection, self.path)

    # --- reading -----------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        with self._read() as connection:
            return list(connection.scalars(select(releases.c.name).distinct().order_by(releases.c.name)))

    def releases(self, name: str | None = None) -> list[Row]:
        c = releases.c
        listing = select(c.name, c.version, c.digest, c.method, c.base, c.size, c.created)
        tagged = select(tags.c.name, tags.c.version, tags.c.tag).order_by(tags.c.tag)
        if name is not None:
            listing, tagged = listing.where(c.name == name), tagged.where(tags.c.name == name)
        with self._read() as connection:
            found: dict[tuple[str, str], tuple[str, ...]] = {}
            for owner, version, tag in connection.execute(tagged):
                found[owner, version] = (*found.get((owner, version), ()), tag)
            rows = [row | {"tags": found.get((row["name"], row["version"]), ())} for row in _dicts(connection, listing)]
        return newest_first([self._row(row) for row in rows])

    def get(self, name: str, version: str) -> Release | None:
        query = select(releases.c.digest, releases.c.manifest).where(
            releases.c.name == name, releases.c.version == version
        )
        with self._read() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        if not _sound(row.manifest, row.digest):
            raise IntegrityError(
                f"{self.path}: the manifest of {name}@{version} is damaged",
                f"adapterhub rm {name}@{version}, then install it again from its source",
            )
        return Release(Manifest.decode(row.manifest), row.digest)

    def children(self, digest: str) -> list[str]:
        query = select(releases.c.name, releases.c.version).join(parents).where(parents.c.digest == digest)
        with self._read() as connection:
            return sorted(f"{name}@{version}" for name, version in connection.execute(query))

    def files(self) -> dict[File, list[str]]:
        query = (
            select(blobs.c.digest, blobs.c.size, releases.c.name, releases.c.version)
            .join(releases)
            .order_by(releases.c.name, releases.c.version)
        )
        needed: dict[File, list[str]] = {}
        with self._read() as connection:
            for digest, size, name, version in connection.execute(query):
                needed.setdefault(File(digest=digest, size=size), []).append(f"{name}@{version}")
        return needed

    def check(self) -> list[str]:
        with self._read() as connection:
            found = [line for (line,) in connection.execute(text("PRAGMA integrity_check")) if line != "ok"]
            for table, *_ in connection.execute(text("PRAGMA foreign_key_check")):
                found.append(f"a row of the table {table} names a release that is not there")
            for row in _dicts(connection, select(releases)):
                found += _contradictions(connection, row)
        return found

    # --- writing -----------------------------------------------------------------------------------------------

    def add(self, new: Sequence[Release]) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._write() as connection:
            for release in new:
                there = connection.scalar(
                    select(releases.c.digest).where(
                        releases.c.name == release.name, releases.c.version == release.version
                    )
                )
                if there is None:
                    _insert(connection, release, now)
                elif there != release.digest:
                    raise NameInUse(
                        f"{release} is there already with other content ({there[:19]}, not {release.digest[:19]})",
                        "a version never changes: take another version or another name",
                    )

    def remove(self, digests: Sequence[str]) -> None:
        with self._write() as connection:
            for digest in digests:
                connection.execute(delete(releases).where(releases.c.digest == digest))

    def set_tag(self, name: str, tag: str, version: str) -> None:
        with self._write() as connection:
            at = (releases.c.name == name, releases.c.version == version)
            if connection.scalar(select(releases.c.id).where(*at)) is None:
                raise NotFound(f"no release {name}@{version}", "adapterhub list shows what is there")
            connection.execute(delete(tags).where(tags.c.name == name, tags.c.tag == tag))
            connection.execute(insert(tags).values(name=name, tag=tag, version=version))

    # --- inside ------------------------------------------------------------------------------------------------

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._told(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._told(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's refusal in the user's words."""
        try:
            yield
        except DBAPIError as error:
            reason = str(error.orig)
            if "not a database" in reason or "malformed" in reason:
                raise IntegrityError(
                    f"{self.path} is no sound database: {reason}", "move it away, or restore it from a copy"
                ) from None
            hints = {
                "full": "free some space and run it again; nothing was changed",
                "locked": "another program holds it; run the command again when that has ended",
                "readonly": "check that the file and its folder are writable; nothing was changed",
            }
            hint = next((hint for word, hint in hints.items() if word in reason), "nothing was changed")
            raise HubError(f"{self.path}: {reason}", hint) from None

    def _row(self, values: dict[str, Any]) -> Row:
        """A row of a list; a damaged file may hold anything."""
        try:
            row = msgspec.convert(values, Row)
            check_version(row.version)
        except (msgspec.ValidationError, UsageError) as error:
            raise IntegrityError(f"{self.path} has a damaged row: {error}", "restore it from a copy") from None
        return row

    def _version(self) -> str | None:
        """Which migration the file is at; None for an empty one."""
        with self._read() as connection:
            present = set(connection.scalars(text("SELECT name FROM sqlite_master WHERE type = 'table'")))
            if "alembic_version" in present:
                return connection.scalar(text("SELECT version_num FROM alembic_version"))
        if present:
            raise HubError(f"{self.path} is a database of something else", "move it away, or work in another folder")
        return None


def _dicts(connection: Connection, query: Select) -> list[dict[str, Any]]:
    """Rows by plain str (SQLAlchemy's names are a subclass)."""
    return [{str(key): value for key, value in row.items()} for row in connection.execute(query).mappings()]


def _sound(manifest: object, digest: object) -> bool:
    return isinstance(manifest, bytes) and digest_of(manifest) == digest


def _columns(release: Release) -> dict[str, Any]:
    """What stands beside the manifest, so that a list need not open it."""
    manifest = release.manifest
    return {
        "name": release.name,
        "version": release.version,
        "digest": release.digest,
        "method": kind(manifest),
        "base": manifest.base.name,
        "size": sum(file.size for file in manifest.files.values()),
    }


def _related(manifest: Manifest) -> dict[Table, list[dict[str, Any]]]:
    """The rows of the tables that hang on a release."""
    sizes = {file.digest: file.size for file in manifest.blobs}
    return {
        parents: [{"digest": digest} for digest in sorted({parent.digest for parent in manifest.parents})],
        blobs: [{"digest": digest, "size": size} for digest, size in sorted(sizes.items())],
    }


def _insert(connection: Connection, release: Release, now: str) -> None:
    values = _columns(release) | {"created": now, "manifest": release.manifest.encode()}
    (key,) = connection.execute(insert(releases).values(values)).inserted_primary_key
    for table, rows in _related(release.manifest).items():
        if rows:
            connection.execute(insert(table), [row | {"release": key} for row in rows])


def _contradictions(connection: Connection, row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one row of releases."""
    label = f"{row['name']}@{row['version']}"
    if not _sound(row["manifest"], row["digest"]):
        yield f"the manifest of {label} is damaged"
        return
    try:
        release = Release(Manifest.decode(row["manifest"]), row["digest"])
    except HubError as error:
        yield f"the manifest of {label} is {error}"
        return
    for column, value in _columns(release).items():
        if row[column] != value:
            yield f"{label}: its {column} is {row[column]!r}, but {value!r} in its manifest"
    for table, rows in _related(release.manifest).items():
        columns = [column for column in table.c if column.name != "release"]
        query = select(*columns).where(table.c.release == row["id"]).order_by(table.c.digest)
        if _dicts(connection, query) != rows:
            yield f"{label}: its {table.name} are not those of its manifest"


def _connect(uri: str) -> sqlite3.Connection:
    # isolation_level None: we say BEGIN ourselves (see _begin). The rollback journal, because in WAL mode SQLite before
    # 3.51.3 can lose committed writes; EXTRA also syncs the folder, so that no commit is undone by a power cut after
    # `remove` has gone on to the blobs.
    connection = sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None)
    for pragma in ("foreign_keys = ON", "journal_mode = DELETE", "synchronous = EXTRA"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _begin(connection: Connection) -> None:
    """Who will write takes the write lock at once: a lock taken midway could fail after others have written."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
