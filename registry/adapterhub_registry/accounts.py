"""Accounts of a registry: who shows which token may write which adapters."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, insert, select

from adapterhub.errors import NameInUse, NotFound, UsageError
from adapterhub.spec.names import NAME
from adapterhub_registry import seals, tables

if TYPE_CHECKING:
    from adapterhub_registry.engine import Engine

PREFIX = "ahub_"
"""What a token begins with, so that scanners for secrets know it."""
_ACCOUNT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_table = tables.accounts


@dataclass(frozen=True)
class Account:
    """Whoever shows its token may read, and may write the adapters that `write` names."""

    name: str
    write: tuple[str, ...] = ()
    """Names (acme/sql), namespaces (acme/*), or * for all."""
    until: str | None = None
    """The last day (YYYY-MM-DD, UTC) on which the token counts."""
    created: str = ""

    def may_write(self, name: str) -> bool:
        namespace = f"{name.partition('/')[0]}/*" if "/" in name else ""
        return bool({"*", name, namespace} & set(self.write))

    @property
    def ended(self) -> bool:
        return self.until is not None and self.until < datetime.now(UTC).date().isoformat()


class Accounts:
    """The accounts that an index keeps."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def add(self, write: list[str], name: str = "", until: str | None = None) -> tuple[Account, str]:
        """Make an account; returns it and its token, which is kept nowhere.

        write: acme/*, acme/sql or *; nothing for an account that only reads. until: YYYY-MM-DD, its last day.
        Raises UsageError, NameInUse."""
        for pattern in write:
            if pattern != "*" and not NAME.fullmatch(pattern.removesuffix("/*") if "/*" in pattern else pattern):
                raise UsageError(f"{pattern!r} names no adapters", "write acme/*, acme/sql or *")
        name = name or f"token-{secrets.token_hex(3)}"
        if not _ACCOUNT.fullmatch(name):
            raise UsageError(f"{name!r} is not a name for a token", "use a-z, 0-9, dot, dash and underscore")
        token = PREFIX + secrets.token_hex(32)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        account = Account(name, tuple(sorted(set(write))), until and _day(until), now)
        with self._engine.write() as connection:
            if connection.scalar(select(_table.c.name).where(_table.c.name == name)) is not None:
                raise NameInUse(f"there is a token named {name!r} already", "take another name, or remove it first")
            row = {"name": name, "write": " ".join(account.write), "until": account.until, "created": now}
            connection.execute(insert(_table).values(row | {"hash": hashed(token)}))
            seals.set_on_accounts(connection)
        return account, token

    def all(self) -> list[Account]:
        """By name."""
        with self._engine.read() as connection:
            return [_account(row) for row in connection.execute(select(_table).order_by(_table.c.name))]

    def remove(self, name: str) -> None:
        """Its token counts no more. Raises NotFound."""
        with self._engine.write() as connection:
            if connection.execute(delete(_table).where(_table.c.name == name)).rowcount == 0:
                raise NotFound(f"there is no token named {name!r}", "adapterhub registry token list shows them")
            seals.set_on_accounts(connection)

    def holding(self, token: str) -> Account | None:
        """Whose token this is, also when it has ended. The hash is looked up, so how long that takes says nothing of the token."""
        with self._engine.read() as connection:
            row = connection.execute(select(_table).where(_table.c.hash == hashed(token))).first()
        return None if row is None else _account(row)

    def writers(self) -> int:
        """How many may write."""
        with self._engine.read() as connection:
            return connection.scalar(select(func.count()).select_from(_table).where(_table.c.write != "")) or 0


def hashed(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise UsageError(f"{text!r} is not a day", "write it as YYYY-MM-DD") from None


def _account(row) -> Account:
    return Account(row.name, tuple(row.write.split()), row.until, row.created)
