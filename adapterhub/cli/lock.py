"""Commands that look at what a project has locked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

import adapterhub
from adapterhub.cli.output import Json, json_out, note, out, size, table
from adapterhub.errors import NotFound

if TYPE_CHECKING:
    from adapterhub.config.lock import Lock, Locked

Offline = Annotated[bool, typer.Option("--offline", help="Ask nothing of the network.")]


def tree(as_json: Json = False) -> None:
    """Show what is locked: each adapter that is asked for, and below it what it needs.

    \b
    Example:
      adapterhub tree
    """
    made = _lock()
    if as_json:
        return json_out(
            {
                "adapters": [record(one) for one in made.adapter],
                "stacks": {stack.name: stack.expression for stack in made.stack},
                "bases": [{"name": base.name, "sketch": base.sketch} for base in made.base],
                "plugins": {plugin.name: plugin.version for plugin in made.plugin},
            }
        )
    bases = {base.sketch: base.name for base in made.base}
    for one in made.adapter:
        if one.asked:
            for depth, below, again in _below(made, one):
                out(f"{'    ' * depth}{below}  {bases[below.base]}  {size(below.size)}  {below.source}{again}")
    for stack in made.stack:
        out(f"stack {stack.name} = {stack.expression}")
    for plugin in made.plugin:
        out(f"plugin {plugin.name} {plugin.version}")


def why(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name or name@version.")],
    as_json: Json = False,
) -> None:
    """Say who needs an adapter that is locked.

    \b
    Example:
      adapterhub why acme/base
    """
    from adapterhub.config import project

    made = _lock()
    found = [one for one in made.adapter if name in (one.name, str(one))]
    if not found:
        raise NotFound(f"{name} is not locked", "adapterhub tree shows what is")
    mine = project.read(project.find())
    stacks, asked = mine.stacked(), mine.adapters
    reasons = []
    for one in found:
        by = [project.FILE] if one.asked and one.name in asked else []
        by += [f"the stack {stack}" for stack, names in stacks.items() if one.asked and one.name in names]
        by += [str(other) for other in made.adapter if one.digest in other.needs]
        reasons.append((one, by))
    if as_json:
        return json_out({"adapters": [{**record(one), "needed_by": by} for one, by in reasons]})
    for one, by in reasons:
        out(f"{one} is needed by {', '.join(by)}")


def outdated(offline: Offline = False, as_json: Json = False) -> None:
    """Show what newer versions there are: the newest that adapterhub.toml allows, and the newest of all.

    \b
    Example:
      adapterhub outdated
    """
    from packaging.version import Version

    from adapterhub.config import project
    from adapterhub.install.options import sources

    folder = project.find()
    asked, made = project.read(folder), _lock()
    found = sources(adapterhub.open(), folder, asked, offline)
    rows = []
    for requirement in asked.requirements():
        _, candidates, _ = found.candidates(requirement.name, requirement.source)
        usable = [c for c in candidates if c.yanked is None]
        best = max((c.version for c in usable), key=Version, default="")
        allowed = max((c.version for c in usable if requirement.accepts(c)), key=Version, default="")
        now = made.chosen(requirement.name)
        if now is not None and now.version != best:
            rows.append((requirement.name, now.version, allowed, best))
    if as_json:
        names = ("name", "locked", "allowed", "newest")
        return json_out({"outdated": [dict(zip(names, row, strict=True)) for row in rows]})
    if not rows:
        return note("everything is the newest")
    table(("NAME", "LOCKED", "ALLOWED", "NEWEST"), rows)


def _lock() -> Lock:
    from adapterhub.config import lock, project

    return lock.read(project.find())


def _below(made: Lock, root: Locked) -> Iterator[tuple[int, Locked, str]]:
    """What a release needs, level by level: depth, release, and a mark where it was shown above."""
    seen: set[str] = set()
    waiting = [(0, root)]
    while waiting:
        depth, one = waiting.pop()
        yield depth, one, "  (see above)" if one.digest in seen else ""
        if one.digest not in seen:
            seen.add(one.digest)
            needed = [made.find(digest) for digest in one.needs]
            waiting += [(depth + 1, below) for below in sorted(filter(None, needed), key=str, reverse=True)]


def record(one: Locked) -> dict[str, Any]:
    """What is locked of a release, as JSON."""
    return {
        "name": one.name,
        "version": one.version,
        "digest": one.digest,
        "size": one.size,
        "source": one.source,
        "asked": one.asked,
        "needs": one.needs,
    }
