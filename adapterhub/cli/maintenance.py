"""Commands that look after a hub: verify, repair, gc, cache, dirs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import adapterhub
from adapterhub.cli.output import Json, json_out, note, out, record, size
from adapterhub.errors import HubError, UsageError
from adapterhub.recovery.repair import repair as bring_again

if TYPE_CHECKING:
    from adapterhub.store.blobs import Problem
    from adapterhub.store.gc import Stray


def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Sizes only, no hashing.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every byte: what is done anyway.")] = False,
    subset: Annotated[
        str | None, typer.Option(metavar="5%", help="Hash a share of the blobs, each day another one.")
    ] = None,
    signed: Annotated[
        bool, typer.Option("--signed", help="Also check signatures, of all that you trust keys for.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Hash every byte of the hub again, and check that every parent is there.

    Exit status 4 if something is wrong.

    \b
    Example:
      adapterhub verify
    """
    if quick + full + (subset is not None) > 1:
        raise UsageError("--quick, --full and --subset exclude one another", "give one of them")
    from adapterhub.store.verify import parse_share

    hub = adapterhub.open()
    problems = hub.verify("quick" if quick else "full" if subset is None else parse_share(subset))
    if signed:
        from adapterhub.trust.policy import unsigned

        problems += unsigned(hub)
    _tell(hub, problems, as_json)


def _tell(hub: adapterhub.Hub, problems: Sequence[Problem], as_json: bool, **more: Any) -> None:
    """Print what is wrong; exit status 4 if something is."""
    if as_json:
        listed = [{"path": str(p.path), "reason": p.reason, "releases": list(p.releases)} for p in problems]
        json_out({"hub": str(hub.root), **more, "problems": listed})
    else:
        for problem in problems:
            out(problem)
        note(f"{hub.root}: {len(problems)} problems" if problems else f"{hub.root} is sound")
    if problems:
        raise typer.Exit(4)


def repair(
    source: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="SOURCE", help="A bundle, a hub's folder or a source; may be repeated."),
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make a lost index again from the blobs.")] = False,
    as_json: Json = False,
) -> None:
    """Bring damaged and missing files again, from wherever they are sound.

    Without --from it looks in the sources of the project and of your configuration. With --rebuild the index itself is made
    again from the blobs; the old one is kept beside it. Exit status 4 if damage is left.

    \b
    Example:
      adapterhub repair --from ../other-hub
    """
    from adapterhub.config import project
    from adapterhub.install.options import sources
    from adapterhub.sources.opening import named

    if rebuild:
        if source:
            raise UsageError("--rebuild and --from exclude one another", "rebuild first, then repair")
        return _rebuild(as_json)
    hub = adapterhub.open()
    folder = project.nearest()
    known = sources(hub, folder, project.read(folder) if folder else None)
    places = [named(text) for text in source] if source else [known.get(name) for name in known.names()]
    done = bring_again(hub, places)
    if not as_json:
        for path in done.mended:
            out(f"{path}: mended")
    _tell(hub, done.left, as_json, mended=[str(path) for path in done.mended])


def _rebuild(as_json: bool) -> None:
    from adapterhub.recovery.rebuild import GONE, rebuild

    done = rebuild()
    hub = adapterhub.open(done.root)
    if not as_json:
        for release in done.releases:
            out(f"{release}  {release.digest}")
        note(f"{done.root}: {len(done.releases)} releases and {done.signatures} signatures are back from the blobs")
        note(f"what no blob tells of is gone: {GONE}")
        if done.damaged:
            note(f"the old index is kept: {done.damaged}")
    problems = [*done.left, *hub.verify("quick")]
    _tell(hub, problems, as_json, releases=[record(release) for release in done.releases], gone=GONE)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; take nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Although the index lists far less than before.")] = False,
    days: Annotated[
        int, typer.Option(min=0, help="Trainings that were left alone for so long lose their checkpoints.")
    ] = 30,
    as_json: Json = False,
) -> None:
    """Take away what no release needs: blobs, half-written files, checkpoints of trainings that were given up.

    Waits until nobody adds or reads. What is listed, leased or being fetched stays.

    \b
    Example:
      adapterhub gc --dry-run
    """
    from adapterhub.store import gc as care

    hub = adapterhub.open()
    _gone(hub.root, care.gc(hub, dry_run, force, days), dry_run, as_json)


def room() -> str:
    """What takes room on a disk that was full, and what frees it."""
    import shutil

    from adapterhub.bases.resolution import cache_folder
    from adapterhub.store import gc as care

    told = ["nothing was changed"]
    with suppress(HubError, OSError):
        hub = adapterhub.open()
        told.append(f"the disk of {hub.root} has {size(shutil.disk_usage(hub.root).free)} free")
        if freed := care.reclaimable(hub):
            told.append(f"adapterhub gc would free {size(freed)}")
    with suppress(HubError, OSError):
        if cached := sum(stray.size for stray in care.clean_cache(cache_folder(), dry_run=True)):
            told.append(f"adapterhub cache --clean would free {size(cached)}")
    return "free some space and run it again: " + "; ".join(told)


def _gone(root: Path, found: Sequence[Stray], dry_run: bool, as_json: bool) -> None:
    total = sum(stray.size for stray in found)
    if as_json:
        listed = [{"path": str(s.path), "size": s.size, "what": s.what} for s in found]
        return json_out({"folder": str(root), "dry_run": dry_run, "size": total, "removed": listed})
    for stray in found:
        out(f"{stray.path}: {stray.what}, {size(stray.size)}")
    note(f"{root}: {len(found)} files {'would go' if dry_run else 'went'}, {size(total)}")


def cache(
    clean: Annotated[bool, typer.Option("--clean", help="Empty it, but for what is in use.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --clean: say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Say where the cache is and what it holds: converted bases, sketches. All of it can be made again.

    \b
    Example:
      adapterhub cache --clean
    """
    from adapterhub.bases.resolution import cache_folder
    from adapterhub.store.gc import clean_cache

    folder = cache_folder()
    found = clean_cache(folder, dry_run or not clean) if folder.is_dir() else []
    if clean:
        return _gone(folder, found, dry_run, as_json)
    if as_json:
        return json_out({"folder": str(folder), "size": sum(stray.size for stray in found)})
    out(folder)
    for stray in found:
        out(f"{size(stray.size):>10}  {stray.path.name}")


def dirs(as_json: Json = False) -> None:
    """Print the folders in use: the hub, your configuration, the cache.

    \b
    Example:
      adapterhub dirs
    """
    from adapterhub.bases.resolution import cache_folder
    from adapterhub.config.user import config_folder

    found = {"hub": str(adapterhub.open().root), "config": str(config_folder()), "cache": str(cache_folder())}
    if as_json:
        return json_out(found)
    for name, folder in found.items():
        out(f"{name + ':':<8}{folder}")
