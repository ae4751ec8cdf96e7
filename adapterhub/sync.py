"""A project brought into a hub: resolve and lock, then install exactly what the lock says."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterhub import plugins
from adapterhub.bases.agreement import base_difference
from adapterhub.config import lock as locks
from adapterhub.config import project as projects
from adapterhub.config import user
from adapterhub.config.lock import Lock, Locked
from adapterhub.config.project import LOCK, Project
from adapterhub.config.source_tables import HERE, Table, own_insecure, own_tables
from adapterhub.errors import HubError, IncompatibleBase, IntegrityError, NotFound, PluginError
from adapterhub.install import locking
from adapterhub.packages import Packages
from adapterhub.resolve import Asked, Resolution, Rules, resolve
from adapterhub.sources import room
from adapterhub.sources.source import Source, closure
from adapterhub.sources.table import Sources
from adapterhub.spec.address import address
from adapterhub.spec.manifest import Base, Release

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
    hub: Packages, folder: Path | None = None, project: Project | None = None, offline: bool = False
) -> Sources:
    """The project's sources, then the user's, then the hub itself."""
    mine = own_tables()
    tables = [(name, table, folder) for name, table in project.sources.items()] if project and folder else []
    tables += [(name, table, user.config_folder()) for name, table in mine.items()]
    if url := os.environ.get("ADAPTERHUB_REGISTRY"):
        insecure = own_insecure(address(url, "ADAPTERHUB_REGISTRY"))
        tables.append(("registry", Table(url=url, insecure=insecure), user.config_folder()))
    return Sources(hub, tables, offline or os.environ.get("ADAPTERHUB_OFFLINE", "") not in ("", "0"))


def lock(
    hub: Packages, folder: Path, options: Options, update: Collection[str] | None = None
) -> tuple[Lock, bool, list[str]]:
    """The lock of the project in a folder, made or brought up to date; whether it changed; what the user should know.

    What is locked already stays where it still fits; update: names that are looked for anew, () for all.
    Raises StaleLock under `locked`, NotFound under `frozen` without one, and what `resolve` raises."""
    project = projects.read(folder)
    if options.frozen:
        return locks.read(folder), False, []
    before = locks.read(folder) if options.locked or (folder / LOCK).exists() else None
    if options.locked and before is not None:
        locks.require_fresh(before, project, folder)
        return before, False, []
    if before is not None and update is None and not options.exclude_newer and before.requirements == project.stated():
        return before, False, []
    keep = {one.name: one.digest for one in before.adapter if one.asked} if before and update != () else {}
    keep = {name: digest for name, digest in keep.items() if name not in (update or ())}
    found = sources(hub, folder, project, options.offline)
    rules = Rules(options.exclude_newer, options.but, keep, _copies(hub, found))
    asked = [Asked(requirement, _asker(project, requirement.name)) for requirement in project.requirements()]
    answer = resolve(asked, found, project.stacked(), rules)
    made = locking.made(project, answer)
    return made, locks.write(folder, made), answer.notes


def sync(hub: Packages, folder: Path, lock: Lock, options: Options) -> tuple[list[Release], list[str]]:
    """Bring what the lock says and the hub lacks; the releases that came, and what the user should know.

    Raises NotFound, naming the digest, for what a source no longer has, IntegrityError for another under its name:
    nothing takes the place of what is locked."""
    project = projects.read(folder)
    _require_plugins(lock)
    found = sources(hub, folder, project, options.offline)
    notes: list[str] = []
    wanted: list[tuple[Source, Release]] = []
    for one in lock.adapter:
        if one.asked:
            notes += _yanked(found, one)
        if not one.asked or _has(hub, one.digest):
            continue
        source = _source(found, one, folder)
        wanted.append((source, _locked_release(source, one)))
    came = _bring(hub, wanted, options.max_bytes)
    for one in lock.adapter:
        here = hub.index.find(one.digest)
        if here is None:
            raise NotFound(f"{one} ({one.digest}) is locked, and what needs it does not", "adapterhub lock")
        locks.require_agreement(one, here)
    return came, notes


def install(hub: Packages, asked: Sequence[Asked], options: Options) -> tuple[list[Release], list[str]]:
    """Bring the newest releases that fit together and meet the requirements, from the sources there are."""
    try:
        folder = projects.find()
        project = projects.read(folder)
    except NotFound:
        folder, project = None, None
    found = sources(hub, folder, project, options.offline)
    rules = Rules(options.exclude_newer, options.but, {}, _copies(hub, found))
    answer = resolve(asked, found, {}, rules)
    here = [release for release, source in answer.chosen.values() if source == HERE]
    wanted = [(found.get(source), release) for release, source in answer.chosen.values() if source != HERE]
    return here + _bring(hub, wanted, options.max_bytes), answer.notes


def _bring(hub: Packages, wanted: Sequence[tuple[Source, Release]], max_bytes: int | None) -> list[Release]:
    """Bring releases of several sources. Raises HubError, before anything is fetched, when they announce too many bytes."""
    if max_bytes is not None:
        every = [one for source, release in wanted for one in closure(source, [release])]
        room.check_cap(
            room.announced(hub.store, every), max_bytes, ", ".join(str(release) for _, release in wanted[:5])
        )
    return [one for source, release in wanted for one in hub.bring(source, [release])]


def stack(hub: Packages, name: str) -> str:
    """The pinned expression of a stack of the nearest project, whose releases are in this hub.

    Raises NotFound for a stack that is not locked or a release that was not synced, IntegrityError for another release
    under a locked version."""
    folder = projects.find()
    project, lock = projects.read(folder), locks.read(folder)
    locks.require_fresh(lock, project, folder)
    found = next((one for one in lock.stack if one.name == name), None)
    if found is None:
        raise NotFound(
            f"{folder / projects.FILE} has no stack {name!r}", f"it has {', '.join(project.stacks) or 'none'}"
        )
    _require_plugins(lock)
    for one in lock.adapter:
        here = hub.index.get(one.name, one.version)
        if here is None:
            raise NotFound(f"{one} is locked, and not in {hub.root}", "adapterhub sync")
        if here.digest != one.digest:
            raise IntegrityError(f"{one} in {hub.root} is {here.digest}, the lock says {one.digest}", "adapterhub lock")
    return found.expression


def _has(hub: Packages, digest: str) -> bool:
    """Whether the release and all that it needs to run is here; its files with their sizes, bytes unhashed."""
    waiting, seen = [digest], set()
    while waiting:
        release = hub.index.find(digest := waiting.pop())
        if release is None or [*hub.store.verify(release.manifest.needs, hashing=lambda blob: False)]:
            return False
        seen.add(digest)
        waiting += [parent.digest for parent in release.manifest.required if parent.digest not in seen]
    return True


def _require_plugins(lock: Lock) -> None:
    """Raise PluginError unless the plugins are the locked ones: other code may run the same tensors otherwise."""
    for plugin in lock.plugin:
        here = plugins.installed(plugin.name)
        if here != plugin.version:
            raise PluginError(
                f"{plugin.name} {plugin.version} is locked, and {here or 'none'} is installed",
                f"install {plugin.name}=={plugin.version}, or adapterhub lock",
            )


def _asker(project: Project, name: str) -> str:
    if name in project.adapters:
        return projects.FILE
    return "the stack " + next(stack for stack, names in project.stacked().items() if name in names)


def _source(found: Sources, one: Locked, folder: Path) -> Source:
    if one.source == HERE:
        raise NotFound(
            f"{one} ({one.digest}) was made in the hub where {folder / LOCK} was locked, and is not in this one",
            "publish it from there to a source that both know",
        )
    return found.get(one.source)


def _locked_release(source: Source, one: Locked) -> Release:
    try:
        release = source.release(one.name, one.version, one.digest)
        locks.require_agreement(one, release)
        return release
    except NotFound as error:
        raise NotFound(
            f"{one} ({one.digest}) is locked, and {one.source} no longer has it: {error}",
            "ask its publisher; or take another version: adapterhub update " + one.name,
        ) from None
    except IntegrityError as error:
        raise locks.StaleLock(
            f"{one} is not what the lock says: {error}", "restore the lock, or find out who changed the release"
        ) from None


def _yanked(found: Sources, one: Locked) -> list[str]:
    if one.source == HERE or found.offline:
        return []
    try:
        offered = found.get(one.source).candidates(one.name)
    except HubError:  # what is here already needs no source
        return []
    return [f"{one} was yanked: {c.yanked}" for c in offered if c.digest == one.digest and c.yanked is not None]


def _copies(hub: Packages, found: Sources):
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


def _fetch_sketch(hub: Packages, found: Sources, base: Base) -> None:
    if base.sketch.size > LARGEST_SKETCH:
        return
    for name in found.names():
        try:
            return found.get(name).fetch([base.sketch], hub.store)
        except HubError:
            continue


__all__ = ["Options", "Resolution", "install", "lock", "sources", "stack", "sync"]
