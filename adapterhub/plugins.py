"""Installed parts, found by entry point. Listing reads metadata only; a part is imported when it is used.

Code of other distributions runs only when the user has enabled them. Groups: adapterhub.forms, .methods and so on (GROUPS). Built-ins come through the same door.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points, requires
from pathlib import Path
from typing import Any

import msgspec

from adapterhub.boundary import Wrong, guard, introduce
from adapterhub.errors import HubError, PluginError, UsageError

KINDS = {
    "forms": "adapterhub.modification.Modification",
    "composers": "adapterhub.modification.Modification",
    "methods": "adapterhub.method.Method",
    "objectives": "adapterhub.objective.Objective",
    "recipes": "adapterhub.recipe.Recipe",
    "schedules": "adapterhub.parameter_schedule.ParameterSchedule",
    "verifiers": "adapterhub.verifier.Verifier",
    "mergers": "adapterhub.mergers.Merger",
    "codecs": "adapterhub.codecs.Codec",
    "bases": "builtins.object",
}
"""Group -> the class that its parts are subclasses of, by name: to import it would cost every command torch."""
GROUPS = tuple(kind for kind in KINDS if kind != "composers")
"""The groups that packages add parts to. Composers are ours alone: each has a word in the language of expressions, and the
parser knows the words."""


@cache
def _installed(group: str) -> dict[str, list[EntryPoint]]:
    """Every entry point of a group by its name; of those that are written alike, one."""
    points: dict[str, dict[str, EntryPoint]] = {}
    for point in sorted(entry_points(group=f"adapterhub.{group}"), key=_owner):
        points.setdefault(point.name, {}).setdefault(point.value, point)
    return {name: list(found.values()) for name, found in sorted(points.items())}


def _points(group: str) -> dict[str, EntryPoint]:
    """The entry point that each name of a group means. Raises PluginError for a name that two enabled packages bring."""
    return {
        name: found[0] if len(found) == 1 else _first(group, name, found) for name, found in _installed(group).items()
    }


def _first(group: str, name: str, found: list[EntryPoint]) -> EntryPoint:
    """A built-in part wins, then the enabled package: one that merely is installed cannot get in anybody's way."""
    for point in found:
        if point.dist and point.dist.name == "adapterhub":
            return point
    enabled = [point for point in found if point.dist and is_enabled(point.dist.name)]
    if len(enabled) > 1:
        raise PluginError(
            f"two packages bring {group} named {name!r}: {_owner(enabled[0])} and {_owner(enabled[1])}",
            f"adapterhub plugins disable {enabled[1].dist.name}, or uninstall one of them",
        )
    return enabled[0] if enabled else found[0]


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else ""


def names(group: str) -> list[str]:
    """The names installed in a group, sorted. Imports nothing."""
    return list(_points(group))


def enabled_names(group: str) -> list[str]:
    """The names of a group whose code may run: built-in parts, and those of enabled packages. Imports nothing."""
    found = _points(group).items()
    return [name for name, point in found if not _is_outside(point) or is_enabled(point.dist.name)]


def _is_outside(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name != "adapterhub"


def distribution(group: str, name: str) -> str:
    """ "adapterhub-loreft 0.1.0": which installed distribution brings this part."""
    return _owner(_point(group, name))


def installed(distribution: str) -> str | None:
    """The version of a distribution that brings parts, if it is installed."""
    return next(
        (
            point.dist.version
            for group in GROUPS
            for found in _installed(group).values()
            for point in found
            if point.dist and point.dist.name == distribution
        ),
        None,
    )


def is_enabled(distribution: str) -> bool:
    """Return whether code of an outside distribution may run: the user has enabled it, for themselves (config.toml), for a
    project that is theirs (adapterhub.toml, `folders`) or for this process (ADAPTERHUB_PLUGINS: names with commas, * for all).
    That it is installed is not enough: another package may have brought it along."""
    from adapterhub import folders, settings

    here = os.environ.get("ADAPTERHUB_PLUGINS", "").replace(" ", "").split(",")
    if "*" in here or distribution in here or distribution in settings.enabled(settings.load().plugins):
        return True
    folder = _asking_project(distribution)
    return folder is not None and folders.is_own("projects", folder)


def _asking_project(distribution: str) -> Path | None:
    """The folder of the nearest project, if its file enables a distribution."""
    from adapterhub import project, settings

    folder = project.nearest()
    asks = folder is not None and distribution in settings.enabled(project.read(folder).plugins)
    return folder if asks else None


def runs(installed: str, made_with: str) -> bool:
    """Whether a plugin's installed version runs what was made with another: not older, and of the same major version."""
    from packaging.version import InvalidVersion, Version

    try:
        here, then = Version(installed), Version(made_with)
    except InvalidVersion:
        return installed == made_with
    return here >= then and here.major == then.major


def origin(made_with: str) -> str:
    """How to come by a part that is missing, when its manifest says that "adapterhub-loreft 0.1.0" brings it: only packages
    that we know are named."""
    name = made_with.partition(" ")[0]
    if is_known(name):
        return f"it was made with {made_with}: install that package"
    return "install the package that brings it, if you trust whoever made it"


def is_known(distribution: str) -> bool:
    """Whether we may name it to a user as something to install: it is here, of our own tree, or in the project's lock.
    Anybody can write anything into a manifest."""
    return installed(distribution) is not None or distribution in ours() or distribution in _locked()


def ours() -> set[str]:
    """Our own packages that bring parts: what adapterhub's own metadata offers as its extra `plugins`."""
    extra = (line.partition(";") for line in requires("adapterhub") or ())
    return {
        re.split(r"[^a-z0-9-]", name.strip())[0]
        for name, _, marker in extra
        if 'extra == "plugins"' in marker.replace("'", '"')
    }


def _locked() -> set[str]:
    """The packages that the project's lock names."""
    from adapterhub import lock, project

    folder = project.nearest()
    try:
        return set() if folder is None else {plugin.name for plugin in lock.read(folder).plugin}
    except HubError:  # none, or a broken one: another command says so
        return set()


def needed(parts: Iterable[str], *groups: str) -> dict[str, str]:
    """Distributions besides adapterhub that bring these parts (forms and composers, unless other groups are given) ->
    their versions: what a manifest says is needed to run."""
    wanted, found = set(parts), {}
    for group in groups or ("forms", "composers"):
        for name in wanted & set(names(group)):
            point = _point(group, name)
            if point.dist and point.dist.name != "adapterhub":
                found[point.dist.name] = point.dist.version
    return dict(sorted(found.items()))


def _point(group: str, name: str) -> EntryPoint:
    points = _points(group)
    if name not in points:
        near = get_close_matches(name, points, 1)
        raise PluginError(
            f"no {group[:-1]} named {name!r} is installed",
            f"did you mean {near[0]!r}?"
            if near
            else f"installed: {', '.join(points) or 'none'}; or install its package",
        )
    return points[name]


@cache
def load(group: str, name: str) -> Any:
    """The part itself, imported: a class of its kind. Raises PluginError if it is not installed, not enabled, does not import, or
    is something else."""
    point = _point(group, name)
    owner = point.dist.name if point.dist else ""
    if owner != "adapterhub" and not is_enabled(owner):
        from adapterhub import folders

        if folder := _asking_project(owner):
            folders.require("projects", folder)
        raise PluginError(
            f"the {group[:-1]} {name!r} is code of {_owner(point)}, which is not enabled",
            f"if you trust it: adapterhub plugins enable {owner}",
        )
    try:
        part = point.load()
    except Exception as error:  # a plugin is anybody's code: whatever it raises is told as its own fault
        raise PluginError(
            f"{group[:-1]} {name!r} of {_owner(point)} does not load: {type(error).__name__}: {error}",
            f"update or uninstall {_owner(point).split(' ')[0]}",
        ) from error
    label = f"{_owner(point) or point.value}: {group[:-1]} {name}"
    if not isinstance(part, type):
        raise PluginError(
            f"{label}: its entry point {point.value} is not a class, but a {type(part).__name__}",
            f"update or uninstall {_owner(point).split(' ')[0]}",
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


def options(config: type, given: dict[str, Any], parse: bool = True) -> Any:
    """A part's Config from options; text (`--set r=8`) is converted to the field's type. parse: text may be a list or a
    table (not where it was read out of one already). Raises UsageError."""
    with guard(config, "Config"):
        fields = {field.name: field for field in msgspec.inspect.type_info(config).fields}
    unknown = [name for name in given if name not in fields]
    if unknown:
        near = get_close_matches(unknown[0], fields, 1)
        raise UsageError(
            f"unknown option {unknown[0]!r}",
            f"did you mean {near[0]!r}?" if near else f"options: {', '.join(fields) or 'none'}",
        )
    values = {
        name: _parsed(value, fields[name].type) if parse and isinstance(value, str) else value
        for name, value in given.items()
    }
    with guard(config, "Config"):
        try:
            return msgspec.convert(values, config, strict=False)
        except (msgspec.ValidationError, ValueError) as error:
            raise UsageError(
                f"an option has a wrong value: {error}", "adapterhub plugins show NAME lists the options"
            ) from None


def _parsed(text: str, wanted: msgspec.inspect.Type) -> Any:
    """`q_proj,v_proj` and JSON become what they say, a lone value becomes a list of one where only a list fits."""
    if text[:1] in "[{":
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise UsageError(f"{text!r} is not JSON: {error}", 'write a list as [1,2] and a table as {"a":1}') from None
    kinds = wanted.types if isinstance(wanted, msgspec.inspect.UnionType) else (wanted,)
    lists = any(isinstance(kind, msgspec.inspect.VarTupleType | msgspec.inspect.ListType) for kind in kinds)
    texts = any(isinstance(kind, msgspec.inspect.StrType) for kind in kinds)
    return text.split(",") if "," in text or (lists and not texts and text) else text
