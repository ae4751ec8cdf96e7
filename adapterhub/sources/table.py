"""Sources by name: the [sources] tables of a project and of the user, and which of them has what."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from adapterhub import settings
from adapterhub.errors import NotFound, UsageError
from adapterhub.files import durable
from adapterhub.spec.address import LOOKS, Address, address, shown
from adapterhub.spec.names import PART
from adapterhub.spec.requirement import SOURCE

if TYPE_CHECKING:
    from adapterhub.packages import Packages
    from adapterhub.sources import Candidate, Source

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
    own = settings.load().sources
    mine = {name: settings.converted(table, Table, f"[sources.{name}]") for name, table in own.items()}
    check_tables(mine, settings.config_file())
    return mine


def own_insecure(there: Address) -> bool:
    """Whether the user's own config.toml, not a project's file, allows plain HTTP to this origin."""
    own = own_tables().values() if not there.private else ()
    return any(table.insecure and table.url and address(table.url).origin == there.origin for table in own)


class Sources:
    """Every source there is, by name, in the order in which they are asked."""

    def __init__(self, hub: Packages, tables: Iterable[tuple[str, Table, Path]], offline: bool = False):
        """tables: name, table and the folder that its path starts from; of two with one name the first counts."""
        self._hub = hub
        self._tables: dict[str, tuple[Table, Path]] = {}
        for name, table, folder in tables:
            self._tables.setdefault(name, (table, folder))
        self._opened: dict[str, Source] = {}
        self.offline = offline

    def names(self) -> list[str]:
        return [*self._tables, HERE]

    def get(self, name: str) -> Source:
        """A source by its name. Raises NotFound."""
        if name not in self._opened:
            self._opened[name] = self._open(name)
        return self._opened[name]

    def bound(self, adapter: str) -> list[str]:
        """The names of the sources in which an adapter is looked for: those that its namespace is bound to, else all."""
        namespace = adapter.partition("/")[0] if "/" in adapter else ""
        owners = [name for name, (table, _) in self._tables.items() if namespace in table.namespaces]
        return owners or [name for name in self.names() if name == HERE or not self._tables[name][0].namespaces]

    def candidates(self, adapter: str, only: str | None = None) -> tuple[str, list[Candidate], list[str]]:
        """The first source that has the name, what it has, and the others that have a higher version."""
        names = [only] if only else self.bound(adapter)
        offered = [(name, self.get(name).candidates(adapter)) for name in names]
        having = [(name, found) for name, found in offered if found]
        if not having:
            return "", [], []
        first, found = having[0]
        best = _newest(found)
        return first, found, [name for name, other in having[1:] if _newest(other) > best]

    def _open(self, name: str) -> Source:
        from adapterhub.sources import open_table

        if name == HERE:
            from adapterhub.sources.disk import Disk

            return Disk(self._hub)
        if name not in self._tables:
            raise NotFound(
                f"there is no source named {shown(name)!r}",
                f"known are {', '.join(self.names())}; adapterhub.toml or your config.toml may name more as [sources.NAME]",
            )
        table, folder = self._tables[name]
        return open_table(name, table, folder, self.offline)


def _newest(found: list[Candidate]):
    from packaging.version import Version

    return max(Version(candidate.version) for candidate in found)


def resolved_path(text: str, folder: Path) -> Path:
    """A path of a table, from the folder of its file."""
    return (folder / durable.user_path(text)).resolve()
