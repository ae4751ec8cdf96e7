"""Which installed part each name means. Listing reads metadata only: nothing is imported."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import EntryPoint

from adapterhub.errors import PluginError
from adapterhub.plugins.enabled import is_enabled
from adapterhub.plugins.metadata import entry_points_of, owner_of


def points(group: str) -> dict[str, EntryPoint]:
    """The entry point that each name of a group means. Raises PluginError for a name that two enabled packages bring."""
    return {
        name: found[0] if len(found) == 1 else _first(group, name, found)
        for name, found in entry_points_of(group).items()
    }


def _first(group: str, name: str, found: list[EntryPoint]) -> EntryPoint:
    """A built-in part wins, then the enabled package: one that merely is installed cannot get in anybody's way."""
    for point in found:
        if point.dist and point.dist.name == "adapterhub":
            return point
    enabled = [point for point in found if point.dist and is_enabled(point.dist.name)]
    if len(enabled) > 1:
        raise PluginError(
            f"two packages bring {group} named {name!r}: {owner_of(enabled[0])} and {owner_of(enabled[1])}",
            f"adapterhub plugins disable {enabled[1].dist.name}, or uninstall one of them",
        )
    return enabled[0] if enabled else found[0]


def names(group: str) -> list[str]:
    """The names installed in a group, sorted. Imports nothing."""
    return list(points(group))


def enabled_names(group: str) -> list[str]:
    """The names of a group whose code may run: built-in parts, and those of enabled packages. Imports nothing."""
    found = points(group).items()
    return [name for name, point in found if not _is_outside(point) or is_enabled(point.dist.name)]


def _is_outside(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name != "adapterhub"


def distribution(group: str, name: str) -> str:
    """ "adapterhub-loreft 0.1.0": which installed distribution brings this part."""
    return owner_of(point_of(group, name))


def needed(parts: Iterable[str], *groups: str) -> dict[str, str]:
    """Distributions besides adapterhub that bring these parts (forms and composers, unless other groups are given) ->
    their versions: what a manifest says is needed to run."""
    wanted, found = set(parts), {}
    for group in groups or ("forms", "composers"):
        for name in wanted & set(names(group)):
            point = point_of(group, name)
            if point.dist and point.dist.name != "adapterhub":
                found[point.dist.name] = point.dist.version
    return dict(sorted(found.items()))


def point_of(group: str, name: str) -> EntryPoint:
    found = points(group)
    if name not in found:
        near = get_close_matches(name, found, 1)
        raise PluginError(
            f"no {group[:-1]} named {name!r} is installed",
            f"did you mean {near[0]!r}?"
            if near
            else f"installed: {', '.join(found) or 'none'}; or install its package",
        )
    return found[name]
