"""Why no versions fit together, in words: who asked for what, and what would work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub import plugins
from adapterhub.errors import HubError

if TYPE_CHECKING:
    from adapterhub.install.question import Found

SHOWN = 8
"""Versions that are listed of one adapter."""


class Conflict(HubError):
    """No choice of versions does what everybody asks for."""


def explain(causes: Iterable[tuple[Any, Any]], offered: Callable[..., Sequence[Found]]) -> Conflict:
    """The error for what stood against each other. causes: requirement, and the candidate that has it (None: the user)."""
    from adapterhub.install.question import Asked, BaseOf, Plugin

    requirements: list[Any] = []
    for requirement, _ in causes:
        if requirement not in requirements:
            requirements.append(requirement)
    asked = [one for one in requirements if isinstance(one, Asked)]
    based = [one for one in requirements if isinstance(one, BaseOf)]
    needed = [one for one in requirements if isinstance(one, Plugin)]
    if needed:
        return _plugin(needed)
    if based:
        return _base(based, offered)
    return _versions(asked, offered)


def _versions(asked: Sequence[Any], offered: Callable[..., Sequence[Found]]) -> Conflict:
    name = asked[0].requirement.name
    lines = [f"no version of {name} is what everybody asks for:"]
    for one in sorted(asked, key=lambda one: one.by):
        fits = [
            f.candidate.version for f in offered(name, one.requirement.source) if one.requirement.accepts(f.candidate)
        ]
        lines.append(f"{one.by} asks for {one.requirement}, which {_list(fits) or 'nothing'} would be")
    return Conflict(
        "\n  ".join(lines), f"change one of them; there is {_list([f.candidate.version for f in offered(name)])}"
    )


def _base(based: Sequence[Any], offered: Callable[..., Sequence[Found]]) -> Conflict:
    group = based[0].group
    lines = [f"what runs together in {group} was made for different bases:"]
    for one in sorted(based, key=lambda one: one.by):
        lines.append(f"{one.by} runs on {_base_text(one.base)}")
    where: dict[str, dict[str, list[str]]] = {}
    names = sorted({one.by.partition("@")[0] for one in based})
    for name in names:
        for found in offered(name)[:SHOWN]:
            base = found.releases[0].manifest.base
            where.setdefault(_base_text(base), {}).setdefault(name, []).append(found.candidate.version)
    works = [
        f"on {base}: " + ", ".join(f"{name} {_list(versions)}" for name, versions in sorted(found.items()))
        for base, found in sorted(where.items())
        if len(found) == len(names)
    ]
    hint = (
        "ask for versions that share a base; " + "; ".join(works)
        if works
        else "no versions share a base: train one of them again on the other's"
    )
    return Conflict("\n  ".join(lines), hint)


def _plugin(needed: Sequence[Any]) -> Conflict:
    one = max(needed, key=lambda one: one.version)
    who = ", ".join(sorted({each.by for each in needed}))
    here = plugins.installed(one.name)
    if here is not None:
        return Conflict(
            f"{who} was made with {one.name} {one.version}, and {here} is installed",
            f"install a version of {one.name} from {one.version} on, of the same major version",
        )
    if plugins.is_known(one.name):
        return Conflict(
            f"{who} needs the plugin {one.name} {one.version}, which is not installed", f"install {one.name}"
        )
    return Conflict(  # a manifest may name any package: we do not tell people to install what a stranger wrote
        f"{who} needs a plugin that is not installed and that this installation does not know",
        "its manifest says which (adapterhub show); install it if you trust its publisher",
    )


def _base_text(base: Any) -> str:
    return f"{base.name} ({base.sketch.digest.removeprefix('sha256:')[:12]})"


def _list(versions: Sequence[str]) -> str:
    return ", ".join(versions[:SHOWN]) + (f" and {len(versions) - SHOWN} more" if len(versions) > SHOWN else "")
