"""Commands that keep a hub in another place: backup and restore."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import adapterhub
from adapterhub.cli.output import Json, json_out, note, size
from adapterhub.config import folders
from adapterhub.files import durable
from adapterhub.opening import open_source


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that does not exist yet.")],
    as_json: Json = False,
) -> None:
    """Write the whole hub to one file, in one state, while others may go on working.

    Trainings under way, keys and your configuration are not in it.

    \b
    Example:
      adapterhub backup hub.tar
    """
    from adapterhub.recovery.backup import backup

    hub = adapterhub.open()
    written = backup(hub, durable.user_path(file))
    if as_json:
        return json_out({"hub": str(hub.root), "file": str(file), "size": written})
    note(f"{hub.root}: {size(written)} in {file}")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What adapterhub backup wrote.")],
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where; it must be new or empty.")] = Path(),
    as_json: Json = False,
) -> None:
    """Make a hub of a backup in a new or empty folder, every byte checked.

    \b
    Example:
      adapterhub restore hub.tar my-adapters
    """
    from adapterhub.recovery.backup import restore

    folder = restore(durable.user_path(file), durable.user_path(directory))
    open_source(folder).releases()  # a backup may be a stranger's: nothing but tables and indexes becomes one's own
    folders.add("hubs", folder)
    if as_json:
        return json_out({"hub": str(folder.resolve())})
    note(f"{folder.resolve()} is a hub as it was; a registry's clients may have seen a later state of it")
