"""What a training begins with: fresh modifications of a method, or an adapter that goes on; over which frozen ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from adapterhub import plugins
from adapterhub.adapters.adapter import Adapter, forms_of
from adapterhub.errors import UsageError
from adapterhub.kinds.contracts import make
from adapterhub.kinds.method import BuildContext, Method, Parts, Stage
from adapterhub.kinds.modification import Modifications
from adapterhub.runtime.model import Model
from adapterhub.runtime.plan import gated
from adapterhub.spec.expression import references
from adapterhub.spec.manifest import Made, Parent, Release
from adapterhub.spec.parser import parse
from adapterhub.store.expand import expand
from adapterhub.store.releases import Releases
from adapterhub.training.watched import staged


@dataclass(frozen=True)
class StartingPoint:
    """What is trained, from where, over what."""

    made: Made | None
    method: Method | None
    config: Any
    parents: list[Parent]
    beneath: str | None
    """The frozen adapters under it, as an expression."""
    goes_on: Release | None

    def stages(self, hub: Releases, model: Model, force: bool) -> Sequence[Stage]:
        """What is trained, in order. An adapter that goes on has one stage: the last of its method."""
        stages = self._stages(hub, model, force)
        children = [parent.label for parent in self.parents if parent.relation == "gate"]
        return gating(stages, lambda: [model.parts(child) for child in children]) if children else stages

    def _stages(self, hub: Releases, model: Model, force: bool) -> Sequence[Stage]:
        if self.goes_on is None:
            return staged(self.method, self.config)
        from adapterhub.bases.fingerprint import check_base

        record = self.goes_on.manifest.base
        check_base(record, hub.store.read(record.sketch), model.fingerprint, force=force)
        stored = self.stored(hub)
        if self.method is None:
            return [Stage("train", lambda given: stored)]
        last = self.method.stages(self.config)[-1]
        single = {path: parts[0] for path, parts in stored.items()}

        def build(given: BuildContext) -> Parts:
            return self._continued(last.build(replace(given, before=single)), stored)

        return [replace(last, build=build, measurement=None, options=None, check=None)]

    def stored(self, hub: Releases) -> Modifications | None:
        """What the adapter that goes on has so far; None of a new one."""
        return Adapter.load(hub, self.goes_on).modifications() if self.goes_on else None

    def _continued(self, fresh: Parts, stored: Modifications) -> Parts:
        """What its method makes (with dropout and whatever else is not stored) around the stored tensors."""
        here = forms_of({path: [part] for path, part in fresh.items()})
        absent = here.keys() - stored.keys() if self.method.starts_at_base else set()  # a schedule never trained there
        if {path: forms for path, forms in here.items() if path not in absent} != forms_of(stored):
            raise UsageError(
                f"{self.goes_on} is not what its method {self.made.name!r} makes of this base, so it cannot go on",
                "train a new adapter over it: --on",
            )
        for path, parts in stored.items():
            fresh[path].tensors = parts[0].tensors
        return fresh


def gating(stages: Sequence[Stage], children: Callable[[], Sequence[Modifications]]) -> Sequence[Stage]:
    """The stages of a method that `weighs`, over what it weighs."""

    def wrapped(stage: Stage) -> Stage:
        def where(given: BuildContext, acting: Sequence[Modifications]) -> BuildContext:
            return replace(given, sites=[site for site in given.sites if any(site.path in child for child in acting)])

        def build(given: BuildContext) -> Parts:
            acting = children()
            fresh = stage.build(where(given, acting))
            gates = gated({path: [gate] for path, gate in fresh.items()}, acting, "the new gate")
            return {path: gate for path, [gate] in gates.items()}

        def check(given: BuildContext) -> None:
            stage.check(where(given, children()))

        return replace(stage, build=build, check=stage.check and check)

    return [wrapped(stage) for stage in stages]


def starting_point(
    hub: Releases,
    method: str | None,
    options: Mapping[str, Any] | None,
    on: Sequence[str] | None,
    continue_from: str | None,
) -> StartingPoint:
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
        parents = [parent for parent in goes_on.manifest.parents if parent.relation in ("on", "gate")]
        for parent in parents:
            hub.exact(parent)
        beneath = goes_on.manifest.recipe.get("beneath")
        if beneath is None and any(parent.relation == "on" for parent in parents):
            raise UsageError(
                f"{goes_on} was trained among others, not on top of a stack",
                "go on in a loop of your own: hub.load(base, expression, trainable=[name])",
            )
        parents.insert(0, _parent(goes_on, "continue"))
    else:
        if method is None:
            raise UsageError("no method to train with", f"one of: {', '.join(plugins.enabled_names('methods'))}")
        made = Made(name=method, options=dict(options or {}), distribution=plugins.distribution("methods", method))
        under = [hub.resolve(each) for each in ([on] if isinstance(on, str) else on or ())]
        if plugins.load("methods", method).weighs:
            if len(under) < 2:
                raise UsageError(f"the method {method!r} weighs adapters against each other", "give two: --on A --on B")
            made = msgspec.structs.replace(made, options=made.options | {"children": len(under)})
            parents += [_parent(release, "gate") for release in under]
        elif under:
            stack = expand(hub, parse(" + ".join(map(str, under))))
            parents += [_parent(hub.resolve(each), "on") for each in dict.fromkeys(references(stack))]
            beneath = str(stack)
    instance = config = None
    if made is not None:
        cls = plugins.load("methods", made.name)
        instance, config = make(cls), plugins.options(cls.Config, dict(made.options))
        distribution = plugins.distribution("methods", made.name)
        made = Made(name=made.name, options=msgspec.to_builtins(asdict(config)), distribution=distribution)
    return StartingPoint(made, instance, config, parents, beneath, goes_on)


def _parent(release: Release, relation: str) -> Parent:
    return Parent(name=release.name, version=release.version, digest=release.digest, relation=relation)
