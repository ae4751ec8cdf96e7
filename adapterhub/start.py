"""What a training begins with: fresh modifications of a method, or an adapter that goes on; over which frozen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from adapterhub import plugins
from adapterhub.adapter import Adapter, Modifications, forms_of
from adapterhub.compose import expand
from adapterhub.errors import UsageError
from adapterhub.expression import parse, references
from adapterhub.manifest import Made, Parent, Release
from adapterhub.method import Method
from adapterhub.runtime import Model

if TYPE_CHECKING:
    from adapterhub.hub import Hub


@dataclass(frozen=True)
class Start:
    """What is trained, from where, over what."""

    made: Made | None
    method: Method | None
    config: Any
    parents: list[Parent]
    beneath: str | None
    """The frozen adapters under it, as an expression."""
    goes_on: Release | None

    def attach(self, hub: Hub, model: Model, seed: int, force: bool) -> None:
        """Put the parts to train on the model."""
        parts: Modifications = {}
        if self.method is not None:
            torch.manual_seed(seed)
            parts = {path: [part] for path, part in self.method.build(model.sites, self.config).items()}
        if self.goes_on is not None:
            from adapterhub.bases.fingerprint import check_base

            record = self.goes_on.manifest.base
            check_base(record, hub.store.read(record.sketch.digest), model.fingerprint, force=force)
            parts = self._continued(parts, Adapter.load(hub, self.goes_on).modifications())
        model.attach_new(parts)
        if not model.trainable_parameters():
            raise UsageError(f"there is nothing to train: {self._name} made no tensors", "check its options")

    def _continued(self, fresh: Modifications, stored: Modifications) -> Modifications:
        """What its method makes (with dropout and whatever else is not stored) around the stored tensors."""
        if self.method is None:
            return stored
        if forms_of(fresh) != forms_of(stored):
            raise UsageError(
                f"{self.goes_on} is not what its method {self._name} makes of this base, so it cannot go on",
                "train a new adapter over it: --on",
            )
        for path, parts in fresh.items():
            for part, source in zip(parts, stored[path], strict=True):
                part.tensors = source.tensors
        return fresh

    @property
    def _name(self) -> str:
        return repr(self.made.name) if self.made else "no method"

    def after_step(self, parts: Modifications) -> None:
        if self.method is not None:
            self.method.after_step({path: part for path, [part] in parts.items()})


def start(
    hub: Hub,
    method: str | None,
    options: Mapping[str, Any] | None,
    on: Sequence[str] | None,
    continue_from: str | None,
) -> Start:
    """What train's arguments ask for; nothing slow happens. Raises UsageError, NotFound and PluginError."""
    goes_on, parents, made, beneath = None, [], None, None
    if continue_from is not None:
        if method or options or on:
            raise UsageError(
                "an adapter goes on with its own method, options and parents",
                "leave method, options and on out, or train a new adapter on it",
            )
        goes_on = hub.resolve(continue_from)
        if goes_on.manifest.compose is not None:
            raise UsageError(f"{goes_on} is a composition: it has no tensors", "continue one of its parts")
        made = goes_on.manifest.method
        parents = [parent for parent in goes_on.manifest.parents if parent.relation == "on"]
        for parent in parents:
            hub.exact(parent)
        beneath = goes_on.manifest.recipe.get("beneath")
        if parents and beneath is None:
            raise UsageError(
                f"{goes_on} was trained among others, not on top of a stack",
                "go on in a loop of your own: hub.load(base, expression, trainable=[name])",
            )
        parents.insert(0, _parent(goes_on, "continue"))
    else:
        if method is None:
            raise UsageError("no method to train with", f"one of: {', '.join(plugins.names('methods'))}")
        made = Made(name=method, options=dict(options or {}), distribution=plugins.distribution("methods", method))
        if on:
            under = [hub.resolve(each) for each in ([on] if isinstance(on, str) else on)]
            stack = expand(hub, parse(" + ".join(map(str, under))))
            parents += [_parent(hub.resolve(each), "on") for each in dict.fromkeys(references(stack))]
            beneath = str(stack)
    instance = config = None
    if made is not None:
        cls = plugins.load("methods", made.name)
        instance, config = cls(), plugins.options(cls.Config, dict(made.options))
        distribution = plugins.distribution("methods", made.name)
        made = Made(name=made.name, options=msgspec.to_builtins(asdict(config)), distribution=distribution)
    return Start(made, instance, config, parents, beneath, goes_on)


def _parent(release: Release, relation: str) -> Parent:
    return Parent(name=release.name, version=release.version, digest=release.digest, relation=relation)
