"""A form or a method that is tried at sites of one role alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adapterhub.errors import UsageError
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.method import BuildContext, Method, Parts, Stage
from adapterhub.kinds.modification import Modification
from adapterhub.sites import Site, sites
from adapterhub.testing.bed import tiny_for


def only_at(part: type[Any], role: str) -> type[Any]:
    """The same part, which makes something at sites of this role and nothing elsewhere.

    Raises UsageError for a role that the tiny model has not, or at which a form suits no site."""
    model = tiny_for(part)
    roles = sorted({site.role for site in sites(model)})
    if role not in roles:
        raise UsageError(f"the laws' tiny model has no site of the role {role!r}", f"its roles: {', '.join(roles)}")
    if issubclass(part, Method):
        return _named(part, {"stages": lambda self, config: _stages(part.stages(self, config), role)})
    suits = sorted({site.role for site in sites(model) if call(part, "random", site, site=site.path) is not None})
    if role not in suits:
        raise UsageError(f"the form {part.form!r} suits no site of the role {role!r}", f"it suits: {', '.join(suits)}")

    def random(cls: type[Modification], site: Site) -> Modification | None:
        return part.random(site) if site.role == role else None

    return _named(part, {"random": classmethod(random)})


def _named(part: type, own: dict[str, Any]) -> type:
    """A subclass that errors call by the part's own name."""
    return type(part.__name__, (part,), {"__module__": part.__module__, "__qualname__": part.__qualname__, **own})


def _stages(stages: Sequence[Stage], role: str) -> list[Stage]:
    def at(stage: Stage) -> Stage:
        def build(given: BuildContext) -> Parts:
            return stage.build(replace(given, sites=[site for site in given.sites if site.role == role]))

        return replace(stage, build=build)

    return [at(stage) for stage in stages]
