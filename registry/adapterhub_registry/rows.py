"""Releases as rows: what stands in which column, and what contradicts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import msgspec
from sqlalchemy import (
    Boolean,
    Connection,
    Select,
    Table,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    union,
    union_all,
)

from adapterhub.errors import HubError, IntegrityError, ManifestError
from adapterhub.spec.digest import check_digest, digest_of
from adapterhub.spec.manifest import File, Manifest, Release
from adapterhub.spec.names import check_version
from adapterhub.store.index import Row, kind
from adapterhub_registry import seals
from adapterhub_registry.tables import (
    adapters,
    blobs,
    leases,
    manifests,
    parents,
    releases,
    signatures,
    tag_moves,
    tags,
)

REPAIR = "adapterhub verify lists all damage; restore a backup, or adapterhub repair --rebuild"
LOST = (
    "adapterhub repair --rebuild makes it again from the blobs, adapterhub restore brings a backup into another folder;"
    " to begin anew, move the blobs away, then adapterhub init"
)
LISTED = [releases.c[name] for name in ("name", "version", "digest", "method", "base", "size", "created", "yanked")]
"""What a `Row` shows, but its tags."""
_AT_ONCE = 500
"""Pairs that a statement may hold."""


def listed(connection: Connection, query: Select) -> list[Row]:
    """Rows of a list with their tags. Raises ValidationError or UsageError for what is no row."""
    found = dicts(connection, query)
    tagged: dict[tuple[str, str], tuple[str, ...]] = {}
    named = select(tags.c.name, tags.c.version, tags.c.tag).order_by(tags.c.tag)
    if len(found) <= _AT_ONCE:
        named = named.where(tuple_(tags.c.name, tags.c.version).in_([(row["name"], row["version"]) for row in found]))
    for owner, version, tag in connection.execute(named):
        tagged[owner, version] = (*tagged.get((owner, version), ()), tag)
    result = [msgspec.convert(row | {"tags": tagged.get((row["name"], row["version"]), ())}, Row) for row in found]
    for row in result:
        check_version(row.version)
    return result


def dicts(connection: Connection, query: Select) -> list[dict[str, Any]]:
    """Rows by plain str (SQLAlchemy's names are a subclass)."""
    return [{str(key): value for key, value in row.items()} for row in connection.execute(query).mappings()]


def sound(manifest: object, digest: object) -> bool:
    return isinstance(manifest, bytes) and digest_of(manifest) == digest


def sort_key(version: str) -> str:
    """The version in digits that sort as text."""
    return "".join(piece.zfill(9) for piece in version.split("."))


def columns(release: Release) -> dict[str, Any]:
    """What stands beside the manifest, so that a list need not open it."""
    manifest = release.manifest
    return {
        "name": release.name,
        "version": release.version,
        "digest": release.digest,
        "method": kind(manifest),
        "base": manifest.base.name,
        "size": sum(file.size for file in manifest.files.values()),
        "sort": sort_key(release.version),
        "structure": manifest.base.structure,
    }


def related(manifest: Manifest) -> dict[Table, list[dict[str, Any]]]:
    """The rows of the tables that hang on a release."""
    files = {file.digest: {"size": file.size, "parts": file.parts} for file in manifest.needs}
    needed = {parent.digest for parent in manifest.required}
    labels = {parent.digest: parent.label for parent in manifest.parents}
    return {
        parents: [{"digest": d, "label": label, "needed": d in needed} for d, label in sorted(labels.items())],
        blobs: [{"digest": digest, **file} for digest, file in sorted(files.items())],
    }


def add(connection: Connection, release: Release, now: str) -> None:
    """Insert a release and all that hangs on it."""
    (key,) = connection.execute(insert(releases).values(columns(release) | {"created": now})).inserted_primary_key
    connection.execute(insert(manifests).values(release=key, data=release.manifest.encode()))
    for table, rows in related(release.manifest).items():
        if rows:
            connection.execute(insert(table), [row | {"release": key} for row in rows])


def needed(connection: Connection) -> Iterator[tuple[File, str]]:
    """Every file that a release needs: its own, its manifest, its signatures; and the release's name@version.

    Raises IntegrityError for what no blob can be."""
    lists = _files(releases.c.name, releases.c.version)
    for digest, size, split, name, version in connection.execute(union_all(*lists).order_by("name", "version")):
        yield _file(digest, size, split), f"{name}@{version}"


def stored(connection: Connection) -> Iterator[File]:
    """The files of `needed`, each once, as they are read: a million of them take no memory."""
    streamed = connection.execution_options(stream_results=True, yield_per=1000)
    for row in streamed.execute(union(*_files())):
        yield _file(*row)


def _files(*at: Any) -> tuple[Select, ...]:
    whole = literal(False, Boolean)
    return (
        select(blobs.c.digest, blobs.c.size, blobs.c.parts, *at).select_from(blobs.join(releases)),
        select(releases.c.digest, func.length(manifests.c.data), whole, *at).select_from(releases.join(manifests)),
        select(signatures.c.digest, func.length(signatures.c.envelope), whole, *at).join_from(signatures, releases),
    )


def _file(digest: Any, size: Any, split: Any) -> File:
    try:
        return File(digest=check_digest(digest), size=size + 0, parts=split)
    except (TypeError, ManifestError):
        raise IntegrityError(f"the index names {digest!r} as a file of a release", REPAIR) from None


def record(connection: Connection, digest: str) -> bytes | None:
    """The manifest or the envelope with this digest."""
    manifest = select(manifests.c.data).join_from(manifests, releases).where(releases.c.digest == digest)
    for query in (manifest, select(signatures.c.envelope).where(signatures.c.digest == digest)):
        data = connection.scalar(query.limit(1))
        if sound(data, digest):
            return data
    return None


def refresh(connection: Connection, names: Iterable[str]) -> None:
    """Bring what search looks at up to date for these adapters."""
    for name in names:
        newest = (
            select(releases, manifests.c.data)
            .select_from(releases.join(manifests))
            .where(releases.c.name == name)
            .order_by(releases.c.yanked.is_not(None), releases.c.sort.desc())
            .limit(1)
        )
        row = connection.execute(newest).first()
        connection.execute(delete(adapters).where(adapters.c.name == name))
        if row is not None:
            connection.execute(insert(adapters).values(name=name, newest=row.id, words=_words(row)))


def lease(write: Callable[[], AbstractContextManager[Connection]], wanted: list[str], until: float, now: float) -> None:
    """Renew the leases on these digests (until 0: end them), and forget those that ended before now. Many are several
    transactions, between which others get their turn."""
    for begin in range(0, len(wanted) or 1, _AT_ONCE):
        some = wanted[begin : begin + _AT_ONCE]
        with write() as connection:
            connection.execute(delete(leases).where(or_(leases.c.until <= now, leases.c.digest.in_(some))))
            if until and some:
                connection.execute(insert(leases), [{"digest": digest, "until": until} for digest in some])


def _words(row: Any) -> str:
    try:
        licence = Manifest.decode(row.data).licence or ""
    except HubError:
        licence = ""
    return f"{row.name} {row.method} {row.base} {licence}".lower()


def faults(connection: Connection, manifests: bool) -> Iterator[str]:
    """What is wrong with the rows; with `manifests` also what contradicts them, and what changed by itself."""
    try:
        yield from unlisted(connection)
        if manifests:
            yield from all_contradictions(connection)
            yield from seals.broken(connection)
    except (TypeError, ValueError) as error:  # a damaged file may hold a number where a text should be
        yield f"a row is damaged: {error}"


def all_contradictions(connection: Connection) -> Iterator[str]:
    """What is wrong with the rows of releases."""
    query = select(releases, manifests.c.data).select_from(releases.outerjoin(manifests))
    for row in dicts(connection, query):
        yield from contradictions(connection, row)


def contradictions(connection: Connection, row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one row of releases (with its manifest as `data`)."""
    label = f"{row['name']}@{row['version']}"
    if not sound(row["data"], row["digest"]):
        yield f"the manifest of {label} is damaged"
        return
    try:
        release = Release.decode(row["data"], row["digest"])
    except HubError as error:
        yield f"the manifest of {label} is {error}"
        return
    for column, value in columns(release).items():
        if row[column] != value:
            yield f"{label}: its {column} is {row[column]!r}, but {value!r} in its manifest"
    for table, rows in related(release.manifest).items():
        kept = [column for column in table.c if column.name != "release"]
        query = select(*kept).where(table.c.release == row["id"]).order_by(table.c.digest)
        if dicts(connection, query) != rows:
            yield f"{label}: its {table.name} are not those of its manifest"


def unlisted(connection: Connection) -> Iterator[str]:
    """Adapters that search does not know, or knows without a release."""
    known = select(adapters.c.name, func.count(releases.c.id)).outerjoin(releases, releases.c.id == adapters.c.newest)
    listed = {name: count for name, count in connection.execute(known.group_by(adapters.c.name))}
    named = set(connection.scalars(select(releases.c.name).distinct()))
    for name in sorted(named ^ {name for name, count in listed.items() if count}):
        yield f"the table adapters does not agree with the releases of {name}"


def moves(connection: Connection, name: str, tag: str) -> list[str | None]:
    """The versions that a tag has named, oldest first; None where it was taken away."""
    query = select(tag_moves.c.version).where(tag_moves.c.name == name, tag_moves.c.tag == tag)
    return list(connection.scalars(query.order_by(tag_moves.c.id)))
