"""The part itself: imported, and held against the class of its kind."""

from __future__ import annotations

from dataclasses import is_dataclass
from functools import cache
from typing import Any

from adapterhub.errors import PluginError
from adapterhub.plugins.boundary import Wrong, guard, introduce
from adapterhub.plugins.discovery import point_of
from adapterhub.plugins.enabled import asking_project, is_enabled
from adapterhub.plugins.metadata import KINDS, owner_of


@cache
def load(group: str, name: str) -> Any:
    """The part itself, imported: a class of its kind. Raises PluginError if it is not installed, not enabled, does not import, or
    is something else."""
    point = point_of(group, name)
    owner = point.dist.name if point.dist else ""
    if owner != "adapterhub" and not is_enabled(owner):
        from adapterhub.config import folders

        if folder := asking_project(owner):
            folders.require("projects", folder)
        raise PluginError(
            f"the {group[:-1]} {name!r} is code of {owner_of(point)}, which is not enabled",
            f"if you trust it: adapterhub plugins enable {owner}",
        )
    try:
        part = point.load()
    except Exception as error:  # a plugin is anybody's code: whatever it raises is told as its own fault
        raise PluginError(
            f"{group[:-1]} {name!r} of {owner_of(point)} does not load: {type(error).__name__}: {error}",
            f"update or uninstall {owner_of(point).split(' ')[0]}",
        ) from error
    label = f"{owner_of(point) or point.value}: {group[:-1]} {name}"
    if not isinstance(part, type):
        raise PluginError(
            f"{label}: its entry point {point.value} is not a class, but a {type(part).__name__}",
            f"update or uninstall {owner_of(point).split(' ')[0]}",
        )
    introduce(part, label)
    if "Config" in vars(part) and isinstance(part.Config, type):
        introduce(part.Config, label)
    with guard(part, f"entry point {point.value}"):
        _check_class(group, name, part)
    return part


def is_kind(part: type, group: str) -> bool:
    """Whether a class is of the kind that the group's parts are."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == KINDS[group] for cls in part.__mro__)


def _check_class(group: str, name: str, part: type) -> None:
    """Raise Wrong unless the class is of its group's kind, and declares what it must."""
    if not is_kind(part, group):
        raise Wrong(f"a subclass of {KINDS[group]} was expected, this is {part.__module__}.{part.__qualname__}")
    if group == "bases" and not callable(getattr(part, "folder", None)):
        raise Wrong("a base has a method folder(), and this class has none")
    if KINDS[group].endswith("Modification") and getattr(part, "form", None) != name:
        raise Wrong(
            f"its `form` is {getattr(part, 'form', None)!r}, and its entry point {name!r}: they must be one name"
        )
    if hasattr(part, "Config") and not (isinstance(part.Config, type) and is_dataclass(part.Config)):
        raise Wrong("its Config is not a dataclass: write @dataclass(frozen=True) above it")
    for names in ("stores", "optional", "constants", "kinds", "extras"):
        if isinstance(getattr(part, names, ()), str):
            raise Wrong(f"`{names}` is a text, where names in a tuple are expected: ({getattr(part, names)!r},)")
