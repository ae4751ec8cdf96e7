"""What a user may say of an install, and the sources it looks in."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from adapterhub.bases.agreement import base_difference
from adapterhub.config import user
from adapterhub.config.project import Project
from adapterhub.config.source_tables import Table, own_insecure, own_tables
from adapterhub.errors import HubError, IncompatibleBase
from adapterhub.sources.table import Sources
from adapterhub.spec.address import address
from adapterhub.spec.manifest import Base
from adapterhub.store.releases import Releases

LARGEST_SKETCH = 64 << 20
"""Bytes of a sketch that is fetched to compare two bases; a base's has a few MB."""


@dataclass(frozen=True)
class Options:
    """How a project is locked and brought."""

    locked: bool = False
    """The lock must be up to date; else StaleLock, and nothing changes."""
    frozen: bool = False
    """The lock is taken as it is."""
    offline: bool = False
    """Nothing is asked of the network."""
    exclude_newer: str = ""
    """Releases after this time (UTC, ISO 8601) are not seen ..."""
    but: Collection[str] = ()
    """... unless they have one of these names."""
    max_bytes: int | None = None
    """What all that comes may announce in bytes."""


def sources(
    hub: Releases, folder: Path | None = None, project: Project | None = None, offline: bool = False
) -> Sources:
    """The project's sources, then the user's, then the hub itself."""
    mine = own_tables()
    tables = [(name, table, folder) for name, table in project.sources.items()] if project and folder else []
    tables += [(name, table, user.config_folder()) for name, table in mine.items()]
    if url := os.environ.get("ADAPTERHUB_REGISTRY"):
        insecure = own_insecure(address(url, "ADAPTERHUB_REGISTRY"))
        tables.append(("registry", Table(url=url, insecure=insecure), user.config_folder()))
    return Sources(hub, tables, offline or os.environ.get("ADAPTERHUB_OFFLINE", "") not in ("", "0"))


def copies_of_one_model(hub: Releases, found: Sources):
    """Whether two bases are copies of one model: needs their sketches, which are fetched from wherever they are."""

    def copies(one: Base, other: Base) -> bool:
        with hub.store.shared():
            for base in (one, other):
                if hub.store.fault(base.sketch) is not None:
                    _fetch_sketch(hub, found, base)
            try:
                return not base_difference(hub, one, other)
            except (HubError, IncompatibleBase):
                return False

    return copies


def _fetch_sketch(hub: Releases, found: Sources, base: Base) -> None:
    if base.sketch.size > LARGEST_SKETCH:
        return
    for name in found.names():
        try:
            return found.get(name).fetch([base.sketch], hub.store)
        except HubError:
            continue
