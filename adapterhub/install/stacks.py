"""From what a user writes to an expression: stack:NAME is that stack of the nearest project."""

from __future__ import annotations

from adapterhub import plugins
from adapterhub.config import lock as locks
from adapterhub.config import project as projects
from adapterhub.config.lock import Lock
from adapterhub.errors import IntegrityError, NotFound, PluginError
from adapterhub.spec.expression import Ensemble, Node
from adapterhub.spec.parser import parse
from adapterhub.store.releases import Releases

STACK = "stack:"
"""How a named stack of a project stands where an expression does."""


def read(hub: Releases, text: str) -> Node | Ensemble:
    """An expression as a user writes it; `stack:helpdesk` is that stack of the nearest project, as its lock pins it.

    Raises ExpressionError, and what `stack` raises."""
    if text.startswith(STACK):
        text = stack(hub, text.removeprefix(STACK).strip())
    return parse(text)


def stack(hub: Releases, name: str) -> str:
    """The pinned expression of a stack of the nearest project, whose releases are in this hub.

    Raises NotFound for a stack that is not locked or a release that was not synced, IntegrityError for another release
    under a locked version."""
    folder = projects.find()
    project, lock = projects.read(folder), locks.read(folder)
    locks.require_fresh(lock, project, folder)
    found = next((one for one in lock.stack if one.name == name), None)
    if found is None:
        raise NotFound(
            f"{folder / projects.FILE} has no stack {name!r}", f"it has {', '.join(project.stacks) or 'none'}"
        )
    require_plugins(lock)
    for one in lock.adapter:
        here = hub.index.get(one.name, one.version)
        if here is None:
            raise NotFound(f"{one} is locked, and not in {hub.root}", "adapterhub sync")
        if here.digest != one.digest:
            raise IntegrityError(f"{one} in {hub.root} is {here.digest}, the lock says {one.digest}", "adapterhub lock")
    return found.expression


def require_plugins(lock: Lock) -> None:
    """Raise PluginError unless the plugins are the locked ones: other code may run the same tensors otherwise."""
    for plugin in lock.plugin:
        here = plugins.installed(plugin.name)
        if here != plugin.version:
            raise PluginError(
                f"{plugin.name} {plugin.version} is locked, and {here or 'none'} is installed",
                f"install {plugin.name}=={plugin.version}, or adapterhub lock",
            )
