"""Sources by name: the [sources] tables of a project and of the user, and which of them has what."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.config.source_tables import HERE, Table
from adapterhub.errors import NotFound
from adapterhub.spec.address import shown
from adapterhub.store.releases import Releases

if TYPE_CHECKING:
    from adapterhub.sources.source import Candidate, Source


class Sources:
    """Every source there is, by name, in the order in which they are asked."""

    def __init__(self, hub: Releases, tables: Iterable[tuple[str, Table, Path]], offline: bool = False):
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
        from adapterhub.sources.opening import open_table

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
