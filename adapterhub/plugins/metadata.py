"""What installed packages say that they bring, from their metadata: nothing is imported."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

KINDS = {
    "forms": "adapterhub.kinds.modification.Modification",
    "composers": "adapterhub.kinds.modification.Modification",
    "methods": "adapterhub.kinds.method.Method",
    "objectives": "adapterhub.kinds.objective.Objective",
    "recipes": "adapterhub.kinds.recipe.Recipe",
    "schedules": "adapterhub.kinds.schedule.ParameterSchedule",
    "verifiers": "adapterhub.kinds.verifier.Verifier",
    "mergers": "adapterhub.kinds.merger.Merger",
    "codecs": "adapterhub.kinds.codec.Codec",
    "bases": "builtins.object",
}
"""Group -> the class that its parts are subclasses of, by name: to import it would cost every command torch."""


GROUPS = tuple(kind for kind in KINDS if kind != "composers")
"""The groups that packages add parts to. Composers are ours alone: each has a word in the language of expressions, and the
parser knows the words."""


@cache
def entry_points_of(group: str) -> dict[str, list[EntryPoint]]:
    """Every entry point of a group by its name; of those that are written alike, one."""
    points: dict[str, dict[str, EntryPoint]] = {}
    for point in sorted(entry_points(group=f"adapterhub.{group}"), key=owner_of):
        points.setdefault(point.name, {}).setdefault(point.value, point)
    return {name: list(found.values()) for name, found in sorted(points.items())}


def owner_of(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else ""


def installed(distribution: str) -> str | None:
    """The version of a distribution that brings parts, if it is installed."""
    return next(
        (
            point.dist.version
            for group in GROUPS
            for found in entry_points_of(group).values()
            for point in found
            if point.dist and point.dist.name == distribution
        ),
        None,
    )
