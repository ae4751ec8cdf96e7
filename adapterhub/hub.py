"""The hub of a directory: the package manager, and the verbs that need a model. Those import torch, nothing else does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import durable, folders
from adapterhub.errors import HubError, NotFound
from adapterhub.index import Index
from adapterhub.manifest import Release
from adapterhub.packages import Packages
from adapterhub.store import DATABASE, Store
from adapterhub.train_request import TrainRequest, takes

if TYPE_CHECKING:
    from adapterhub.runtime import Model


def open(path: str | Path | None = None, create: bool = False, database: str | None = None) -> Hub:
    """Open the hub in a folder; without a path the nearest one above the working directory, else the user's own.

    The user's own (in ADAPTERHUB_HOME, else the platform's data folder) is made on first use, any other with `create`.
    database: the URL of another database for its index, as a registry may have. Raises NotFound when there is no hub,
    NotTrusted for one above the working directory that is not on the user's list (adapterhub.folders)."""
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
    hub = Hub(root, Database(root / DATABASE, create=new, url=database))
    if new:
        hub.store.prepare()
    return hub


def open_source(path: Path) -> Hub:
    """Open the hub in a folder to install from, as one would a stranger's: nothing in the folder is written, and no query
    takes long or returns much.

    Raises NotFound, and UnsafeFile for what no hub holds or does."""
    path = path.parent if path.name == DATABASE else path
    if not _is_hub(path):
        raise NotFound(f"no hub in {path}", f"name the folder that holds its {DATABASE}; adapterhub init makes one")
    from adapterhub_registry.database import Database

    return Hub(path, Database(path / DATABASE, foreign=True))


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


class Hub(Packages):
    """A hub: get one from `adapterhub.open()`."""

    def import_adapter(
        self,
        folder: str | Path,
        name: str,
        version: str | None = None,
        base: object = None,
        licence: str | None = None,
        force: bool = False,
    ) -> Release:
        """Bring a PEFT adapter in. See adapterhub.formats.importer."""
        from adapterhub.formats.importer import import_adapter

        return import_adapter(self, folder, name, version=version, base=base, licence=licence, force=force)

    def export(self, reference: str, folder: str | Path, format: str = "peft", base: str | Path | None = None) -> Any:
        """Write a release for another program. See adapterhub.formats.exporter."""
        from adapterhub.formats.exporter import export

        return export(self, reference, folder, format=format, base=base)

    @takes(TrainRequest)
    def train(self, request: TrainRequest) -> Release:
        """Train an adapter and publish it: data and a method make a new one, or one is continued as a new version.

        The same call again continues a training that was killed, and ends with the same bytes. See adapterhub.train."""
        from adapterhub.train import train

        return train(self, request)

    def evaluate(self, expression: str | None, base: object, data: str | Path, **settings: Any) -> Any:
        """Measure a composition, or the bare base, on data. See adapterhub.evaluate."""
        from adapterhub.evaluate import evaluate

        return evaluate(self, expression, base, data, **settings)

    def merge(
        self,
        refs: Sequence[str],
        merger: str = "linear",
        weights: Sequence[float] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        name: str,
        version: str | None = None,
        base: object = None,
    ) -> Release:
        """Make one adapter of several. See adapterhub.merge."""
        from adapterhub.merge import merge

        return merge(self, refs, merger=merger, weights=weights, options=options, name=name, version=version, base=base)

    def compress(
        self,
        ref: str,
        codec: str,
        options: Mapping[str, Any] | None = None,
        *,
        name: str,
        version: str | None = None,
    ) -> Release:
        """The same adapter in fewer bytes. See adapterhub.compress."""
        from adapterhub.compress import compress

        return compress(self, ref, codec, options=options, name=name, version=version)

    def compose(self, expression: str, name: str, version: str | None = None) -> Release:
        """Save a composition as an adapter. See adapterhub.compose."""
        from adapterhub.compose import compose

        return compose(self, expression, name, version=version)

    def load(
        self,
        base: object,
        expression: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        trainable: Sequence[str] = (),
        force: bool = False,
    ) -> Model:
        """A base model with a composition on it, to run or to train. See adapterhub.runtime.load."""
        from adapterhub.runtime import load

        return load(self, base, expression, dtype=dtype, device=device, trainable=trainable, force=force)

    def explain(self, expression: str, base: object = None) -> dict[str, Any]:
        """Why an expression will or will not run, and what to type next. See adapterhub.look.explain."""
        from adapterhub.look.explain import explain

        return explain(self, expression, base)

    def diff(self, one: str, other: str) -> dict[str, Any]:
        """How two releases differ, site by site. See adapterhub.look.diff."""
        from adapterhub.look.diff import diff

        return diff(self, one, other)

    def inspect(self, ref: str, base: object = None, force: bool = False) -> dict[str, Any]:
        """How strongly an adapter changes each site. See adapterhub.look.inspect."""
        from adapterhub.look.inspect import inspect

        return inspect(self, ref, base, force=force)
