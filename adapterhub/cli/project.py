"""Commands about a project: adapterhub.toml says what it needs, adapterhub.lock what exactly it runs on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import adapterhub
from adapterhub.cli.lock import Offline, record
from adapterhub.cli.output import Json, json_out, note, one_line, out
from adapterhub.errors import NotFound, UsageError

if TYPE_CHECKING:
    from adapterhub.install.options import Options

Locked_ = Annotated[bool, typer.Option("--locked", help="Fail if the lock is not up to date; change nothing.")]
Frozen = Annotated[bool, typer.Option("--frozen", help="Take the lock as it is, without looking at adapterhub.toml.")]
Newer = Annotated[
    str | None,
    typer.Option("--exclude-newer", metavar="DATE", help="See no release after 2026-11-01 or 2026-11-01T12:00:00Z."),
]
But = Annotated[
    list[str] | None, typer.Option("--but", metavar="NAME", help="An exception to --exclude-newer; may be repeated.")
]

MaxBytes = Annotated[
    str | None,
    typer.Option("--max-bytes", metavar="SIZE", help="Fetch nothing when more than 500MB, 2GB, ... would come."),
]
_UNITS = {
    "": 1,
    "B": 1,
    **{f"{u}{'I' * i}B": b**n for n, u in enumerate("KMGT", 1) for i, b in enumerate((1000, 1024))},
}


def bytes_of(text: str) -> int:
    """500MB -> 500000000; 2GiB -> 2147483648. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]{0,3})", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a number of bytes", "write 500MB, 2GB or 1.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def options(
    locked: bool = False,
    frozen: bool = False,
    offline: bool = False,
    exclude_newer: str | None = None,
    but: Sequence[str] | None = None,
    max_bytes: str | None = None,
) -> Options:
    """The options as `adapterhub.install.project` takes them. Raises UsageError."""
    from adapterhub.install.options import Options

    if locked and frozen:
        raise UsageError("--locked and --frozen exclude one another", "give one of them")
    if exclude_newer and not re.fullmatch(r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\dZ)?", exclude_newer):
        raise UsageError(f"{exclude_newer!r} is no date", "write 2026-11-01 or 2026-11-01T12:00:00Z (UTC)")
    if exclude_newer and len(exclude_newer) == 10:
        exclude_newer += "T23:59:59Z"
    return Options(
        locked, frozen, offline, exclude_newer or "", tuple(but or ()), bytes_of(max_bytes) if max_bytes else None
    )


def add(
    requirements: Annotated[
        list[str], typer.Argument(metavar="REQUIREMENT...", help='"acme/sql>=1.2,<2", "team:acme/x".')
    ],
    offline: Offline = False,
) -> None:
    """Ask for adapters in adapterhub.toml (made when missing), lock them, and bring them.

    Nothing changes when what is asked for does not fit together.

    \b
    Example:
      adapterhub add "acme/sql>=1.2,<2"
    """
    from adapterhub.config import project
    from adapterhub.spec.requirement import Requirement

    asked = [Requirement.parse(text) for text in requirements]
    try:
        folder = project.find()
    except NotFound:
        folder = Path.cwd()

    def change() -> None:
        for requirement in asked:
            project.add(folder, requirement)

    _changed(folder, change, options(offline=offline))


def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="As adapterhub.toml has it.")],
    offline: Offline = False,
) -> None:
    """No longer ask for adapters. What is in the hub stays there: adapterhub rm takes it away.

    \b
    Example:
      adapterhub remove acme/sql
    """
    from adapterhub.config import project

    folder = project.find()

    def change() -> None:
        for name in names:
            project.remove(folder, name)

    _changed(folder, change, options(offline=offline))


def lock(
    locked: Locked_ = False,
    offline: Offline = False,
    exclude_newer: Newer = None,
    but: But = None,
    as_json: Json = False,
) -> None:
    """Find the versions that fit together, and write adapterhub.lock. What is locked stays where it still fits.

    \b
    Example:
      adapterhub lock --locked
    """
    from adapterhub.config import project
    from adapterhub.install import project as sync

    folder = project.find()
    made, changed, notes = sync.lock(adapterhub.open(), folder, options(locked, False, offline, exclude_newer, but))
    _told(notes)
    if as_json:
        return json_out({"changed": changed, "adapters": [record(one) for one in made.adapter]})
    note(f"{folder / project.LOCK} {'is new' if changed else 'is up to date'}: {len(made.adapter)} releases")


def sync(
    locked: Locked_ = False,
    frozen: Frozen = False,
    offline: Offline = False,
    exclude_newer: Newer = None,
    but: But = None,
    max_bytes: MaxBytes = None,
    as_json: Json = False,
) -> None:
    """Bring into the hub exactly what the lock says, making it first if need be; every byte hashed.

    \b
    Example:
      adapterhub sync --locked
    """
    from adapterhub.config import project

    _synced(project.find(), options(locked, frozen, offline, exclude_newer, but, max_bytes), None, as_json)


def update(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="All if left out.")] = None,
    offline: Offline = False,
    exclude_newer: Newer = None,
    but: But = None,
) -> None:
    """Take the newest versions that adapterhub.toml allows, and bring them.

    \b
    Example:
      adapterhub update acme/sql
    """
    from adapterhub.config import project

    folder = project.find()
    known = [requirement.name for requirement in project.read(folder).requirements()]
    for name in names or ():
        if name not in known:
            raise NotFound(f"{project.FILE} does not ask for {name}", f"it asks for {', '.join(known) or 'nothing'}")
    _synced(folder, options(False, False, offline, exclude_newer, but), tuple(names or ()), False)


def _changed(folder: Path, change: Any, how: Options) -> None:
    """Change adapterhub.toml, lock and sync; if anything fails both files are as they were."""
    from adapterhub.config import project
    from adapterhub.files import durable

    paths = [folder / project.FILE, folder / project.LOCK]
    before = {path: path.read_bytes() if path.exists() else None for path in paths}
    try:
        change()
        _synced(folder, how, None, False)
    except BaseException:
        for path, data in before.items():
            if data is None:
                durable.remove(path)
            elif path.read_bytes() != data:
                durable.write_bytes(path, data)
        raise


def _synced(folder: Path, how: Options, update: Sequence[str] | None, as_json: bool) -> None:
    from adapterhub.install import project as sync

    hub = adapterhub.open()
    made, changed, notes = sync.lock(hub, folder, how, update)
    came, more = sync.sync(hub, folder, made, how)
    _told(dict.fromkeys([*notes, *more]))
    if as_json:
        came_digests = {release.digest for release in came}
        listed = [{**record(one), "new": one.digest in came_digests} for one in made.adapter]
        return json_out({"changed": changed, "adapters": listed})
    for release in came:
        out(f"{release}  {release.digest}")
    note(f"{len(made.adapter)} releases locked, {len(came)} brought to {hub.root}")


def _told(notes: Any) -> None:
    for line in notes:
        note(f"warning: {one_line(line)}")
