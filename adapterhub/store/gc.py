"""Take away what nobody in a hub needs. No torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import HubError, IntegrityError, NotFound
from adapterhub.files import durable
from adapterhub.store.blobs import DATABASE
from adapterhub.store.index import FILES_AT_GC
from adapterhub.store.records import complete
from adapterhub.store.releases import Releases

DAY = 24 * 3600
"""Seconds."""
AGE = 30
"""Days after which an unfinished training counts as given up."""


@dataclass(frozen=True)
class Stray:
    """Something in a hub's folder that nobody needs."""

    path: Path
    size: int
    """Bytes."""
    what: str


def gc(hub: Releases, dry_run: bool = False, force: bool = False, days: int = AGE) -> list[Stray]:
    """Take away what no release needs, nobody is bringing and no training goes on with; returns what went (or would).

    Blobs under a lease stay, and so does what has come of one, unless forced; whose writer is dead and has no lease goes at once.
    Trainings that were left alone for `days` lose their checkpoints. Raises HubError, and
    takes nothing, when the index lists nothing although there are blobs, or less than half of what it listed the last time
    (unless forced): that is how a lost or half-read index looks. Raises IntegrityError for a damaged index or list of parts."""
    with hub.store.alone():
        if faults := hub.index.check(manifests=False):
            raise IntegrityError(f"the index is damaged: {faults[0]}", "adapterhub verify lists all damage")
        count = sum(1 for _ in hub.index.stored())
        _sure(hub, count, force)
        if not dry_run:
            complete(hub.index, hub.store)
        found = [*_strays(hub, force), *_trainings(hub.root / "training", days)]
        if not dry_run:
            unsynced: set[Path] = set()
            for stray in found:
                if stray.path.is_dir():
                    durable.remove_tree(stray.path)
                else:
                    durable.remove(stray.path, unsynced)
            durable.sync(unsynced)
            hub.index.remember(FILES_AT_GC, count)
            if ended := hub.index.leased(0) - hub.index.leased(time.time()):
                hub.index.lease(ended, 0)
    return found


def reclaimable(hub: Releases) -> int:
    """Bytes that gc would free; 0 while others are at work, or when it would refuse."""
    with suppress(HubError), hub.store.alone(wait=False) as held:
        if held:
            return sum(stray.size for stray in _strays(hub, False))
    return 0


def _sure(hub: Releases, count: int, force: bool) -> None:
    before = hub.index.remembered(FILES_AT_GC) or 0
    if force or (count and 2 * count >= before):
        return
    if count or next(hub.store.stray(()), None) is not None:
        raise HubError(
            f"{hub.root / DATABASE} lists {count} files"
            + (f", {before} at the last gc" if before else " although there are blobs"),
            "if you removed the others yourself: --force; if not, restore the index from a copy",
        )


def _strays(hub: Releases, force: bool) -> Iterator[Stray]:
    leased = {digest.removeprefix("sha256:") for digest in hub.index.leased(time.time())}
    for path in hub.store.stray(hub.index.stored()):
        if path.name not in leased:
            yield _stray(path, "half-written" if path.suffix == durable.TEMPORARY else "needed by no release")
    for folder in (hub.root, hub.root / "incoming"):
        for path in sorted(folder.glob(f".*{durable.TEMPORARY}")):
            yield _stray(path, "half-written")
    # Whoever fetches into this hub shares the lock that we hold alone: nobody writes to a part now. A lease speaks of an
    # upload that may continue; forced, it begins anew.
    for pattern in ("*.part", "*.lock"):
        for path in sorted((hub.root / "incoming").glob(pattern)):
            if force or path.stem not in leased:
                yield _stray(path, "half-fetched")


def _trainings(folder: Path, days: int) -> Iterator[Stray]:
    """Checkpoints and kept stages that were left alone. While any training runs its stages may be anybody's."""
    runs = [path for path in sorted(folder.glob("*")) if path.is_dir() and path.name != "stages"]
    running = [run for run in runs if not _free(run / "lock")]
    for run in runs:
        if run not in running and _age(run) > days:
            yield _stray(run, "an unfinished training")
    for path in sorted((folder / "stages").glob("*")) if not running else ():
        if _age(path) > days:
            yield _stray(path, "a finished stage of a training")


def _free(path: Path) -> bool:
    if not path.exists():
        return True
    with durable.lock(path, wait=False) as held:
        return held


def _age(path: Path) -> float:
    """Days since anything in it changed; a clock that was set back makes nothing older than it is."""
    newest = max((p.stat().st_mtime for p in _files(path)), default=path.stat().st_mtime)
    return (time.time() - newest) / DAY


def _stray(path: Path, what: str) -> Stray:
    return Stray(path, sum(p.lstat().st_size for p in _files(path)), what)


def _files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    return [Path(below, name) for below, _, names in os.walk(path) for name in names]


def clean_cache(folder: Path, dry_run: bool = False) -> list[Stray]:
    """Empty the cache folder of everything that can be made again, but for what is in use. Raises NotFound without one."""
    if not folder.is_dir():
        raise NotFound(f"there is no cache in {folder}", "nothing to clean")
    found = []
    for path in sorted(folder.iterdir()):
        locks = [path] if path.suffix == ".lock" else [path.with_suffix(".lock")]
        if all(_free(lock) for lock in locks):
            found.append(_stray(path, "cached"))
            if not dry_run:
                durable.remove_tree(path) if path.is_dir() else durable.remove(path)
    return found
