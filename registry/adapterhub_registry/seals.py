"""Seals: a digest of all rows about one adapter, kept beside them, by which `verify` sees a row that changed by itself.

SQLite notices a page that is torn, not a letter in a row that became another; and no manifest vouches for tags, yanks,
dates, removed versions. One more seal is over the numbers in the table `state` and the form of the tables. A hub of before there were seals gets all
of them with its next change. Leases have none: they end by themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from sqlalchemy import Connection, delete, func, insert, select, text

from adapterhub.spec.digest import digest_of
from adapterhub_registry import tables
from adapterhub_registry.tables import adapters, gone, releases, signatures, state, tag_moves, tags

SEAL = "seal "
_NUMBERS = f"{SEAL}of state"
_ACCOUNTS = f"{SEAL}of accounts"
_OF = {
    "releases": select(releases.c.name, releases.c.version, releases.c.digest, releases.c.created, releases.c.yanked),
    "tags": select(tags.c.name, tags.c.tag, tags.c.version),
    "tag_moves": select(tag_moves.c.name, tag_moves.c.id, tag_moves.c.tag, tag_moves.c.version),
    "gone": select(gone.c.name, gone.c.version, gone.c.digest),
    "signatures": select(releases.c.name, releases.c.version, signatures.c.digest).join_from(signatures, releases),
    "adapters": select(adapters.c.name, releases.c.version, adapters.c.words).join_from(
        adapters, releases, adapters.c.newest == releases.c.id
    ),
}
"""What is sealed: no two rows of a list are the same, and the first column is the adapter's name."""


def set_on(connection: Connection, names: Sequence[str]) -> None:
    """Seal the rows of these adapters and the numbers as they are now; all of them where there are no seals yet."""
    if connection.scalar(select(state.c.value).where(state.c.key == _NUMBERS)) is None:
        connection.execute(delete(state).where(state.c.key.startswith(SEAL), state.c.key != _ACCOUNTS))
        _insert(connection, _all(connection))
    for name in names:
        connection.execute(delete(state).where(state.c.key == _key(name)))
        _insert(connection, _all(connection, name))
    connection.execute(delete(state).where(state.c.key == _NUMBERS))
    connection.execute(insert(state).values(key=_NUMBERS, value=_numbers(connection)))


def set_on_accounts(connection: Connection) -> None:
    """Seal the accounts as they are now: a letter that changes by itself could let somebody write what is not theirs."""
    connection.execute(delete(state).where(state.c.key == _ACCOUNTS))
    connection.execute(insert(state).values(key=_ACCOUNTS, value=_accounts(connection)))


def broken(connection: Connection) -> Iterator[str]:
    """What is not as it was written."""
    kept = dict(connection.execute(select(state.c.key, state.c.value).where(state.c.key.startswith(SEAL))).all())
    if (accounts := kept.pop(_ACCOUNTS, None)) not in (None, _accounts(connection)):
        yield "an account changed by itself: adapterhub registry token list shows them"
    elif accounts is None and connection.scalar(select(func.count()).select_from(tables.accounts)):
        yield "the seal over the accounts is gone"
    if not kept:
        return
    if kept.pop(_NUMBERS, None) != _numbers(connection):
        yield "its serial number, another of its numbers or the form of a table changed by itself"
    now = _all(connection)
    for name in sorted(now, key=repr):
        if kept.pop(_key(name), None) != now[name]:
            yield f"a row about {name} (its tags, yanks, dates, signatures or removed versions) changed by itself"
    if kept:
        yield f"the rows about {len(kept)} adapters are gone"
    for digest, envelope in connection.execute(select(signatures.c.digest, signatures.c.envelope)):
        if not isinstance(envelope, bytes) or digest_of(envelope) != digest:
            yield f"the signature {digest} is damaged"


def _insert(connection: Connection, seals: dict[str, int]) -> None:
    if seals:
        connection.execute(insert(state), [{"key": _key(name), "value": seal} for name, seal in seals.items()])


def _all(connection: Connection, name: str | None = None) -> dict[str, int]:
    """The seal of every adapter, or of one. Rows are added up, so that their order is nothing."""
    found: dict[str, int] = {}
    for table, query in _OF.items():
        column = query.selected_columns[0]
        for row in connection.execute(query if name is None else query.where(column == name)):
            found[row[0]] = (found.get(row[0], 0) + _number((table, *row))) % (1 << 63)
    return found


def _accounts(connection: Connection) -> int:
    columns = tables.accounts.c
    return _number([tuple(row) for row in connection.execute(select(*columns).order_by(columns.name))])


def _numbers(connection: Connection) -> int:
    query = select(state.c.key, state.c.value).where(state.c.key.not_like(f"{SEAL}%")).order_by(state.c.key)
    found = [tuple(row) for row in connection.execute(query)]
    if connection.dialect.name == "sqlite":  # the tables themselves are rows there
        found += [tuple(row) for row in connection.execute(text("SELECT type, name, tbl_name, sql FROM sqlite_master"))]
    return _number(found)


def _key(name: object) -> str:
    return SEAL + hashlib.sha256(repr(name).encode()).hexdigest()[:32]


def _number(value: object) -> int:
    """63 bits: what a column for whole numbers holds in every database."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8]) >> 1
