"""The hub of a folder: one method for each verb. Verbs that need a model import torch, when they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import opening
from adapterhub.files import durable
from adapterhub.spec.manifest import Release
from adapterhub.store.releases import Releases
from adapterhub.training.request import TrainRequest, takes

if TYPE_CHECKING:
    from adapterhub.runtime.model import Model
    from adapterhub.sources.source import Source
    from adapterhub.spec.expression import Ensemble, Node
    from adapterhub.spec.names import Reference
    from adapterhub.store.blobs import Problem
    from adapterhub.store.verify import Mode


def open(path: str | Path | None = None, create: bool = False, database: str | None = None) -> Hub:
    """Open the hub in a folder; without a path the nearest one above the working directory, else the user's own.

    The user's own (in ADAPTERHUB_HOME, else the platform's data folder) is made on first use, any other with `create`.
    database: the URL of another database for its index, as a registry may have. Raises NotFound when there is no hub,
    NotTrusted for one above the working directory that is not on the user's list (adapterhub.config.folders)."""
    found = opening.open(path, create, database)
    return Hub(found.root, found.index)


class Hub(Releases):
    """A hub: get one from `adapterhub.open()`."""

    def read(self, text: str) -> Node | Ensemble:
        """Return the tree of an expression; `stack:NAME` is that stack of the nearest project, as its lock pins it."""
        from adapterhub.install.stacks import read

        return read(self, text)

    def install(self, source: str | Path, offline: bool = False, max_bytes: int | None = None) -> list[Release]:
        """Bring a release with what it needs from a place. See adapterhub.install.place."""
        from adapterhub.install.place import install

        return install(self, source, offline, max_bytes)

    def bring(self, source: Source, roots: Sequence[Release], max_bytes: int | None = None) -> list[Release]:
        """Bring releases of a source, with what they need. See adapterhub.install.bring."""
        from adapterhub.install.bring import bring

        return bring(self, source, roots, max_bytes)

    def verify(self, mode: Mode = "full") -> list[Problem]:
        """List what is wrong with it; empty when all is sound. See adapterhub.store.verify."""
        from adapterhub.store.verify import verify

        return verify(self, mode)

    def export_bundle(self, reference: str | Reference, folder: str | Path) -> Release:
        """Write a release and what it needs as a bundle: a plain folder that `install` takes."""
        from adapterhub.share import bundle

        release = self.resolve(reference)
        bundle.write(self, release, durable.user_path(folder))
        return release

    def import_adapter(
        self,
        folder: str | Path,
        name: str,
        version: str | None = None,
        base: object = None,
        licence: str | None = None,
        force: bool = False,
    ) -> Release:
        """Bring a PEFT adapter in. See adapterhub.formats.importing."""
        from adapterhub.formats.importing import import_adapter

        return import_adapter(self, folder, name, version=version, base=base, licence=licence, force=force)

    def export(self, reference: str, folder: str | Path, format: str = "peft", base: str | Path | None = None) -> Any:
        """Write a release for another program. See adapterhub.formats.exporting."""
        from adapterhub.formats.exporting import export

        return export(self, reference, folder, format=format, base=base)

    @takes(TrainRequest)
    def train(self, request: TrainRequest) -> Release:
        """Train an adapter and publish it: data and a method make a new one, or one is continued as a new version.

        The same call again continues a training that was killed, and ends with the same bytes. See adapterhub.training.train."""
        from adapterhub.training.train import train

        return train(self, request)

    def evaluate(self, expression: str | None, base: object, data: str | Path, **settings: Any) -> Any:
        """Measure a composition, or the bare base, on data. See adapterhub.evaluation.evaluate."""
        from adapterhub.evaluation.evaluate import evaluate

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
        """Make one adapter of several. See adapterhub.transform.merge."""
        from adapterhub.transform.merge import merge

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
        """The same adapter in fewer bytes. See adapterhub.transform.compress."""
        from adapterhub.transform.compress import compress

        return compress(self, ref, codec, options=options, name=name, version=version)

    def compose(self, expression: str, name: str, version: str | None = None) -> Release:
        """Save a composition as an adapter. See adapterhub.transform.compose."""
        from adapterhub.transform.compose import compose

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
        """A base model with a composition on it, to run or to train. See adapterhub.runtime.model.load."""
        from adapterhub.runtime.model import load

        return load(self, base, expression, dtype=dtype, device=device, trainable=trainable, force=force)

    def explain(self, expression: str, base: object = None) -> dict[str, Any]:
        """Why an expression will or will not run, and what to type next. See adapterhub.analysis.explain."""
        from adapterhub.analysis.explain import explain

        return explain(self, expression, base)

    def diff(self, one: str, other: str) -> dict[str, Any]:
        """How two releases differ, site by site. See adapterhub.analysis.diff."""
        from adapterhub.analysis.diff import diff

        return diff(self, one, other)

    def inspect(self, ref: str, base: object = None, force: bool = False) -> dict[str, Any]:
        """How strongly an adapter changes each site. See adapterhub.analysis.inspect."""
        from adapterhub.analysis.inspect import inspect

        return inspect(self, ref, base, force=force)
