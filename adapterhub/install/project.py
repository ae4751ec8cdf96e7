"""A project brought into a hub: resolve and lock, then install exactly what the lock says."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from adapterhub.config import lock as locks
from adapterhub.config import project as projects
from adapterhub.config.lock import Lock, Locked
from adapterhub.config.project import LOCK, Project
from adapterhub.config.source_tables import HERE
from adapterhub.errors import HubError, IntegrityError, NotFound
from adapterhub.install import locking
from adapterhub.install.options import Options, copies_of_one_model, sources
from adapterhub.install.question import Asked, Resolution, Rules
from adapterhub.install.requirements import bring_from_all, install
from adapterhub.install.resolver import resolve
from adapterhub.install.stacks import require_plugins, stack
from adapterhub.sources.source import Source
from adapterhub.sources.table import Sources
from adapterhub.spec.manifest import Release
from adapterhub.store.releases import Releases


def lock(
    hub: Releases, folder: Path, options: Options, update: Collection[str] | None = None
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
    rules = Rules(options.exclude_newer, options.but, keep, copies_of_one_model(hub, found))
    asked = [Asked(requirement, _asker(project, requirement.name)) for requirement in project.requirements()]
    answer = resolve(asked, found, project.stacked(), rules)
    made = locking.made(project, answer)
    return made, locks.write(folder, made), answer.notes


def sync(hub: Releases, folder: Path, lock: Lock, options: Options) -> tuple[list[Release], list[str]]:
    """Bring what the lock says and the hub lacks; the releases that came, and what the user should know.

    Raises NotFound, naming the digest, for what a source no longer has, IntegrityError for another under its name:
    nothing takes the place of what is locked."""
    project = projects.read(folder)
    require_plugins(lock)
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
    came = bring_from_all(hub, wanted, options.max_bytes)
    for one in lock.adapter:
        here = hub.index.find(one.digest)
        if here is None:
            raise NotFound(f"{one} ({one.digest}) is locked, and what needs it does not", "adapterhub lock")
        locks.require_agreement(one, here)
    return came, notes


def _has(hub: Releases, digest: str) -> bool:
    """Whether the release and all that it needs to run is here; its files with their sizes, bytes unhashed."""
    waiting, seen = [digest], set()
    while waiting:
        release = hub.index.find(digest := waiting.pop())
        if release is None or [*hub.store.verify(release.manifest.needs, hashing=lambda blob: False)]:
            return False
        seen.add(digest)
        waiting += [parent.digest for parent in release.manifest.required if parent.digest not in seen]
    return True


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


__all__ = ["Options", "Resolution", "install", "lock", "sources", "stack", "sync"]
