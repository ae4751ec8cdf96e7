"""Finds the hub's folder and opens it. With `registry serve` the only importer of the registry."""

from __future__ import annotations

import warnings
from pathlib import Path

from adapterhub.config import folders
from adapterhub.errors import HubError, NotFound
from adapterhub.files import durable
from adapterhub.store.blobs import DATABASE, Store
from adapterhub.store.index import Index
from adapterhub.store.releases import Releases


def open(path: str | Path | None = None, create: bool = False, database: str | None = None) -> Releases:
    """Open the hub in a folder; without a path the nearest one above the working directory, else the user's own.

    The user's own (in ADAPTERHUB_HOME, else the platform's data folder) is made on first use, any other with `create`.
    database: the URL of another database for its index, as a registry may have. Raises NotFound when there is no hub,
    NotTrusted for one above the working directory that is not on the user's list (adapterhub.config.folders)."""
    root = find(path)
    create = create or (path is None and not _is_hub(root))
    if not _is_hub(root) and database is None:
        if not create:
            raise NotFound(f"no hub in {root}", f"make one: adapterhub init {root}")
        durable.make_folder(root)
    from adapterhub_registry.database import Database

    new = create and not _is_hub(root)
    if new:
        _claim(root)
    hub = Releases(root, Database(root / DATABASE, create=new, url=database))
    if new:
        hub.store.prepare()
    return hub


def open_source(path: Path) -> Releases:
    """Open the hub in a folder to install from, as one would a stranger's: nothing in the folder is written, and no query
    takes long or returns much.

    Raises NotFound, and UnsafeFile for what no hub holds or does."""
    path = path.parent if path.name == DATABASE else path
    if not _is_hub(path):
        raise NotFound(f"no hub in {path}", f"name the folder that holds its {DATABASE}; adapterhub init makes one")
    from adapterhub_registry.database import Database

    return Releases(path, Database(path / DATABASE, foreign=True))


def find(path: str | Path | None = None) -> Path:
    """Return the folder of the hub that `open` opens. Raises NotTrusted as `open` does."""
    if path is None:
        if root := nearest():
            folders.require("hubs", root)
        return root or folders.home()
    root = durable.user_path(path)
    return root.parent if root.name == DATABASE else root


def nearest() -> Path | None:
    """Return the folder of the nearest hub, from the working directory upwards."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if _is_hub(folder)), None)


def new_index(path: Path) -> Index:
    """Make an empty index in a file of its own, to be filled and put in the place of one that was lost."""
    from adapterhub_registry.database import Database

    return Database(path, create=True)


def _claim(root: Path) -> None:
    """List a hub that is about to be made. A configuration that cannot be written is no reason to make none."""
    try:
        if not folders.is_own("hubs", root):
            folders.add("hubs", root)
    except HubError as error:
        warnings.warn(
            f"{root} cannot be noted as yours ({error}): commands will not use it unless they are given its path",
            stacklevel=3,
        )


def _is_hub(folder: Path) -> bool:
    """An empty database alone is what a process leaves that was killed while it made a hub; beside blobs it is damage, and so
    are blobs without one: opening it says so."""
    database = folder / DATABASE
    if not database.is_file():
        return any(Store(folder).listed())
    return database.stat().st_size > 0 or (folder / "blobs").exists()
