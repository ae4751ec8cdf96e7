"""The [sources] tables of a project and of the user: where releases come from, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from adapterhub.config import user
from adapterhub.errors import UsageError
from adapterhub.files import durable
from adapterhub.spec.address import LOOKS, Address, address
from adapterhub.spec.names import PART
from adapterhub.spec.requirement import SOURCE

HERE = "hub"
"""The name of the hub that is installed into, as a source: what was made here is found here."""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[sources.NAME]: exactly one of url, path and hf."""

    url: str = ""
    """Of a registry."""
    path: str = ""
    """Of another hub's folder, from the folder of the file that says so."""
    hf: str = ""
    """An owner on the Hub: acme/sql is its repo of that name."""
    namespaces: list[str] = []
    """acme/... is looked for here and nowhere else."""
    key: str = ""
    """The public key that signs a registry's lists."""
    insecure: bool = False
    """Its url may be plain HTTP, which others on the way can read and change."""


def check_tables(tables: Mapping[str, Table], where: Path | str) -> None:
    """Raise UsageError for a table that does not say one thing."""
    owners: dict[str, str] = {}
    for name, table in tables.items():
        if not SOURCE.fullmatch(name) or name in (HERE, "hf"):
            raise UsageError(
                f"{where}: [sources.{name}] is no name for a source", "use [a-z][a-z0-9_-]*, not hub or hf"
            )
        if sum(map(bool, (table.url, table.path, table.hf))) != 1:
            raise UsageError(f"{where}: [sources.{name}] needs one of url, path and hf", 'for example path = "../team"')
        if table.url:
            address(table.url, f"{where}: [sources.{name}]")
        if LOOKS.match(table.path):
            raise UsageError(f"{where}: [sources.{name}] has an address as its path", "write url = ... instead")
        if table.hf and not re.fullmatch(r"[\w-][\w.-]*", table.hf, re.ASCII):
            raise UsageError(f"{where}: [sources.{name}] has no owner on the Hub as hf", 'for example hf = "acme"')
        if not table.path.isprintable() or not table.hf.isprintable():
            raise UsageError(f"{where}: [sources.{name}] holds control characters", "write the path as it is")
        for namespace in table.namespaces:
            if not re.fullmatch(PART, namespace):
                raise UsageError(
                    f"{where}: [sources.{name}] binds {namespace!r}, which is no namespace", "acme, of acme/sql"
                )
            if owners.setdefault(namespace, name) != name:
                raise UsageError(
                    f"{where}: {namespace} is bound to {owners[namespace]} and to {name}", "bind it to one"
                )


def own_tables() -> dict[str, Table]:
    """The [sources] of the user's config.toml. Raises UsageError."""
    own = user.load().sources
    mine = {name: user.converted(table, Table, f"[sources.{name}]") for name, table in own.items()}
    check_tables(mine, user.config_file())
    return mine


def own_insecure(there: Address) -> bool:
    """Whether the user's own config.toml, not a project's file, allows plain HTTP to this origin."""
    own = own_tables().values() if not there.private else ()
    return any(table.insecure and table.url and address(table.url).origin == there.origin for table in own)


def resolved_path(text: str, folder: Path) -> Path:
    """A path of a table, from the folder of its file."""
    return (folder / durable.user_path(text)).resolve()
