"""Which folders are the user's own: the hubs that are opened to be written, the projects whose plugins may run.

config.toml:

    [folders]
    hubs = ["/home/me/adapters"]          # `init` and `open(create=True)` add what they make, `trust folder` the rest
    projects = ["/home/me/helpdesk"]      # their adapterhub.toml may say which plugins run
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from adapterhub.config import user
from adapterhub.errors import NotFound, NotTrusted, UsageError
from adapterhub.files import durable

Kind = Literal["hubs", "projects"]


def home() -> Path:
    """Return the user's own hub's folder: ADAPTERHUB_HOME, else the platform's data folder."""
    if folder := os.environ.get("ADAPTERHUB_HOME"):
        return durable.user_path(folder)
    from platformdirs import user_data_dir

    return Path(user_data_dir("adapterhub"))


def listed(kind: Kind) -> list[str]:
    """Return the folders that the user's configuration lists. Raises UsageError for a table that says something else."""
    table = user.load().folders
    found = table.get(kind, [])
    if set(table) - {"hubs", "projects"} or not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise UsageError(
            f"{user.config_file()}: the table [folders] is not right", 'write hubs = ["/a/folder"], projects = []'
        )
    return found


def is_own(kind: Kind, folder: Path) -> bool:
    """Return whether the folder is the user's default hub, or listed."""
    real = folder.resolve()
    return (kind == "hubs" and real == home().resolve()) or str(real) in listed(kind)


def require(kind: Kind, folder: Path) -> None:
    """Raise NotTrusted, which says what to type, unless the folder is the user's own."""
    if not is_own(kind, folder):
        raise NotTrusted(kind, folder.resolve())


def add(kind: Kind, folder: Path) -> None:
    """List a folder; those that do not exist any more leave the list."""
    real = str(folder.resolve())
    if real in listed(kind):
        return
    with user.edited() as document:
        table = document.setdefault("folders", {})
        table[kind] = sorted({real, *(path for path in table.get(kind, []) if Path(path).is_dir())})


def remove(folder: Path) -> None:
    """Take a folder off both lists. Raises NotFound when it is on neither."""
    real = str(folder.resolve())
    if not any(real in listed(kind) for kind in ("hubs", "projects")):
        raise NotFound(f"{real} is not listed", "adapterhub trust folder lists those that are")
    with user.edited() as document:
        table = document["folders"]
        for kind in ("hubs", "projects"):
            if kind in table:
                table[kind] = [path for path in table[kind] if path != real]
