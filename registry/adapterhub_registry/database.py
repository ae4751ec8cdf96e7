"""`Database`: the index of a hub in one SQLite file, through SQLAlchemy Core."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Select, and_, delete, func, insert, or_, select, text, update

from adapterhub.errors import HubError, IntegrityError, NameInUse, NotFound, TagMoved, UsageError
from adapterhub.files import durable
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import File, Release
from adapterhub.store.index import ANY, Row
from adapterhub_registry import rows, seals, tables
from adapterhub_registry.accounts import Accounts
from adapterhub_registry.engine import Engine
from adapterhub_registry.tables import (
    adapters,
    gone,
    leases,
    manifests,
    parents,
    releases,
    signatures,
    state,
    tag_moves,
    tags,
)


class Database:
    """An `adapterhub.store.index.Index` over the SQLite file at `path`, which is made when `create` says so; or over the database at
    `url`, whose tables are made when there are none.

    An older schema is brought up to date, after a copy of the file was put beside it. An empty file is what a process
    killed while it made the hub leaves: with `create` it is filled, without it the hub's contents are lost. Raises
    IntegrityError for that, HubError for a file that is no such database, or a newer one."""

    def __init__(self, path: Path, create: bool = False, url: str | None = None, foreign: bool = False):
        path = Path(path)
        if url is None and not create and not path.exists() and (path.parent / "blobs").exists():
            raise IntegrityError(f"{path} is lost: there are blobs, and nothing lists them", rows.LOST)
        self._engine = Engine(path, create, url, foreign)
        self.path = self._engine.path
        self.accounts = Accounts(self._engine)
        version = self._version()
        if version is None and not create and url is None:
            raise IntegrityError(f"{self.path} is empty: it lists nothing", rows.LOST)
        if foreign and version not in tables.READABLE:
            raise HubError(
                f"{self.path} was made by another version of adapterhub",
                "if it is a hub of yours, a command in its folder brings it up to date: adapterhub list",
            )
        if version != tables.HEAD and not foreign:
            from adapterhub_registry.migrate import upgrade

            with self._engine.write() as connection:
                if version is not None and url is None:  # a reader of the file under our write lock
                    durable.write_file(path.with_name(f"{path.name}.{version}.backup"), path)
                upgrade(connection, self.path)
                seals.set_on(connection, ())

    def names(self, containing: str = "", limit: int | None = None) -> list[str]:
        query = select(adapters.c.name).where(adapters.c.name.contains(containing, autoescape=True))
        with self._engine.read() as connection:
            return list(connection.scalars(query.order_by(adapters.c.name).limit(limit)))

    def releases(
        self, name: str | None = None, after: tuple[str, str] | None = None, limit: int | None = None
    ) -> list[Row]:
        c = releases.c
        query = select(*rows.LISTED).order_by(c.name, c.sort.desc()).limit(limit)
        if name is not None:
            query = query.where(c.name == name)
        if after is not None:
            query = query.where(or_(c.name > after[0], and_(c.name == after[0], c.sort < rows.sort_key(after[1]))))
        with self._engine.read() as connection:
            return self._rows(connection, query)

    def search(
        self, words: Sequence[str], structure: str | None = None, after: str = "", limit: int | None = None
    ) -> list[Row]:
        query = select(*rows.LISTED).select_from(adapters.join(releases)).where(adapters.c.name > after)
        for word in words:
            query = query.where(adapters.c.words.contains(word.lower(), autoescape=True))
        if structure is not None:
            query = query.where(releases.c.structure == structure)
        with self._engine.read() as connection:
            return self._rows(connection, query.order_by(adapters.c.name).limit(limit))

    def get(self, name: str, version: str) -> Release | None:
        return self._one(releases.c.name == name, releases.c.version == version)

    def find(self, digest: str) -> Release | None:
        return self._one(releases.c.digest == digest)

    def children(self, digest: str) -> list[str]:
        query = select(releases.c.name, releases.c.version).select_from(releases.join(parents))
        with self._engine.read() as connection:
            found = connection.execute(query.where(parents.c.digest == digest))
            return sorted(f"{name}@{version}" for name, version in found)

    def missing_parents(self) -> list[tuple[str, str]]:
        here = releases.alias()
        query = (
            select(releases.c.name, releases.c.version, parents.c.label)
            .select_from(releases.join(parents).outerjoin(here, here.c.digest == parents.c.digest))
            .where(parents.c.needed, here.c.id.is_(None))
        )
        with self._engine.read() as connection:
            return sorted((f"{name}@{version}", str(label)) for name, version, label in connection.execute(query))

    def files(self) -> dict[File, list[str]]:
        needed: dict[File, list[str]] = {}
        with self._engine.read() as connection:
            for file, label in rows.needed(connection):
                needed.setdefault(file, []).append(label)
        return needed

    def stored(self) -> Iterator[File]:
        with self._engine.read() as connection:
            yield from rows.stored(connection)

    def record(self, digest: str) -> bytes | None:
        with self._engine.read() as connection:
            return rows.record(connection, digest)

    def copy(self) -> bytes:
        with self._engine.read() as connection:
            return self._engine.copy(connection)

    def check(self, manifests: bool = True) -> list[str]:
        with self._engine.read() as connection:
            return [*self._engine.faults(connection), *rows.faults(connection, manifests)]

    def serial(self) -> int:
        return self.remembered("serial") or 0

    def remembered(self, key: str) -> int | None:
        with self._engine.read() as connection:
            return connection.scalar(select(state.c.value).where(state.c.key == key))

    def tag_moves(self, name: str, tag: str) -> list[str | None]:
        with self._engine.read() as connection:
            return rows.moves(connection, name, tag)

    def signatures(self, digest: str) -> list[bytes]:
        query = select(signatures.c.envelope).join(releases).where(releases.c.digest == digest)
        query = query.order_by(func.length(signatures.c.envelope), signatures.c.digest)  # short ones before any junk
        with self._engine.read() as connection:
            return list(connection.scalars(query))

    def gone(self, name: str) -> dict[str, str]:
        query = select(gone.c.version, gone.c.digest).where(gone.c.name == name)
        with self._engine.read() as connection:
            return {version: digest for version, digest in connection.execute(query)}

    def leased(self, now: float) -> set[str]:
        with self._engine.read() as connection:
            return set(connection.scalars(select(leases.c.digest).where(leases.c.until > now)))

    # --- writing -----------------------------------------------------------------------------------------------

    def add(self, new: Sequence[Release]) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._engine.write() as connection:
            added = []
            for release in new:
                known = select(releases.c.digest).where(*_at(releases, release.name, release.version))
                there = connection.scalar(known)
                was = connection.scalar(select(gone.c.digest).where(*_at(gone, release.name, release.version)))
                for digest, is_ in ((there, "is there already"), (was, "was there before, and was removed,")):
                    if digest not in (None, release.digest):
                        raise NameInUse(
                            f"{release} {is_} with other content ({digest[:19]}, not {release.digest[:19]})",
                            "a version never changes: take another version or another name",
                        )
                if there is None:
                    rows.add(connection, release, now)
                    connection.execute(delete(gone).where(*_at(gone, release.name, release.version)))
                    added.append(release.name)
            self._changed(connection, added)

    def remove(self, digests: Sequence[str]) -> None:
        with self._engine.write() as connection:
            removed = []
            for digest in digests:
                for name, version in connection.execute(
                    select(releases.c.name, releases.c.version).where(releases.c.digest == digest)
                ).all():
                    connection.execute(insert(gone).values(name=name, version=version, digest=digest))
                    connection.execute(delete(releases).where(*_at(releases, name, version)))
                    removed.append(name)
            self._changed(connection, removed)

    def set_tag(self, name: str, tag: str, version: str | None, expected: str | None = ANY) -> None:
        with self._engine.write() as connection:
            if version is not None:
                self._require(connection, name, version)
            now = connection.scalar(select(tags.c.version).where(tags.c.name == name, tags.c.tag == tag))
            if expected not in (ANY, now):
                raise TagMoved(
                    f"{name}@{tag} is {now or 'nothing'} now, not {expected or 'nothing'}",
                    "somebody else moved it: look again, then say what you expect",
                )
            if now == version:
                return
            connection.execute(delete(tags).where(tags.c.name == name, tags.c.tag == tag))
            if version is not None:
                connection.execute(insert(tags).values(name=name, tag=tag, version=version))
            connection.execute(insert(tag_moves).values(name=name, tag=tag, version=version))
            self._changed(connection, [name])

    def yank(self, name: str, version: str, reason: str | None) -> None:
        with self._engine.write() as connection:
            self._require(connection, name, version)
            connection.execute(update(releases).where(*_at(releases, name, version)).values(yanked=reason))
            self._changed(connection, [name])

    def sign(self, digest: str, envelope: bytes) -> None:
        with self._engine.write() as connection:
            query = select(releases.c.id, releases.c.name).where(releases.c.digest == digest)
            key, name = connection.execute(query).first() or (None, "")
            if key is None:
                raise NotFound(f"no release with the digest {digest}", "adapterhub list shows what is there")
            mine = (signatures.c.release == key, signatures.c.digest == digest_of(envelope))
            if connection.scalar(select(signatures.c.release).where(*mine)) is None:
                values = {"release": key, "digest": digest_of(envelope), "envelope": envelope}
                connection.execute(insert(signatures).values(values))
                self._changed(connection, [name])

    def remember(self, key: str, value: int) -> None:
        with self._engine.write() as connection:
            connection.execute(delete(state).where(state.c.key == key))
            connection.execute(insert(state).values(key=key, value=value))
            seals.set_on(connection, ())

    def lease(self, digests: Iterable[str], until: float) -> None:
        wanted, now = sorted(set(digests)), time.time()
        if wanted or self._ended(now):
            rows.lease(self._engine.write, wanted, until, now)

    # --- inside ------------------------------------------------------------------------------------------------

    def _ended(self, now: float) -> bool:
        """Whether a lease ended before now."""
        with self._engine.read() as connection:
            return connection.scalar(select(leases.c.digest).where(leases.c.until <= now).limit(1)) is not None

    def _one(self, *at: Any) -> Release | None:
        query = select(releases.c.name, releases.c.version, releases.c.digest, manifests.c.data)
        query = query.select_from(releases.outerjoin(manifests))
        with self._engine.read() as connection:
            row = connection.execute(query.where(*at)).first()
        if row is None:
            return None
        if not rows.sound(row.data, row.digest):
            raise IntegrityError(
                f"{self.path}: the manifest of {row.name}@{row.version} is damaged",
                f"adapterhub rm {row.name}@{row.version}, then install it again from its source",
            )
        return Release.decode(row.data, row.digest)

    def _require(self, connection: Connection, name: str, version: str) -> None:
        if connection.scalar(select(releases.c.id).where(*_at(releases, name, version))) is None:
            raise NotFound(f"no release {name}@{version}", "adapterhub list shows what is there")

    def _changed(self, connection: Connection, names: Iterable[str]) -> None:
        """To be called last in every transaction, with the names whose rows are others now."""
        names = sorted(set(names))
        rows.refresh(connection, names)
        grown = update(state).where(state.c.key == "serial").values(value=state.c.value + 1)
        if connection.execute(grown).rowcount == 0:
            connection.execute(insert(state).values(key="serial", value=1))
        seals.set_on(connection, names)

    def _rows(self, connection: Connection, query: Select) -> list[Row]:
        try:
            return rows.listed(connection, query)
        except (msgspec.ValidationError, UsageError) as error:  # a damaged file may hold anything
            raise IntegrityError(f"{self.path} has a damaged row: {error}", "restore it from a copy") from None

    def _version(self) -> str | None:
        """Which migration the file is at; None for an empty one."""
        with self._engine.read() as connection:
            present = self._engine.tables(connection)
            if "alembic_version" in present:
                return connection.scalar(text("SELECT version_num FROM alembic_version"))
        if present:
            raise HubError(f"{self.path} is a database of something else", "move it away, or work in another folder")
        return None


def _at(table: Any, name: str, version: str) -> tuple[Any, Any]:
    return table.c.name == name, table.c.version == version
