"""The laws of parts and tiny models, for us and for plugin authors. Floor 6, runtime.

`adapterhub plugins check NAME` runs them over a part; `check("loreft")` does the same in a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from traceback import walk_tb

from adapterhub import plugins
from adapterhub.errors import PluginError, UsageError
from adapterhub.plugins.boundary import author_line


@dataclass(frozen=True)
class Result:
    """What one law said of one part."""

    group: str
    part: str
    law: str
    verdict: str
    """"passed", "failed" or "declined" (the law does not apply; the part says so itself)."""
    detail: str = ""


TRIED = ("forms", "methods", "objectives", "recipes", "schedules", "verifiers", "mergers", "codecs")
"""The groups that have laws."""


def check(name: str, device: str = "cpu", law: str | None = None, role: str | None = None) -> list[Result]:
    """Try the laws over every installed part of that name (a package may bring a form and a method of one name).

    law: this one alone; role: at sites of this role alone ("query"), for forms and methods.
    Raises PluginError if nothing is installed under the name, UsageError for a law that none of them has and a role that the
    tiny model has not, or where the part makes nothing."""
    groups = [group for group in TRIED if name in plugins.names(group)]
    if not groups:
        raise PluginError(f"no part with laws is named {name!r}", "see: adapterhub plugins list")
    if role is not None and not (groups := [group for group in groups if group in ("forms", "methods")]):
        raise UsageError("a site's role is for forms and methods, whose laws run at sites", "leave --site out")
    known = {one.__name__: None for group in groups for one in laws(group)}
    if law is not None and law not in known:
        raise UsageError(f"{name!r} has no law {law!r}", f"its laws: {', '.join(known)}")
    return [result for group in groups for result in check_part(group, name, device, law, role)]


def check_part(
    group: str, name: str, device: str = "cpu", law: str | None = None, role: str | None = None
) -> list[Result]:
    """Try the laws of its group over one installed part; law and role as of `check`."""
    part = plugins.load(group, name)
    if role is not None:
        from adapterhub.testing.role import only_at

        part = only_at(part, role)
    return [_tried(group, name, one, part, device) for one in laws(group) if law in (None, one.__name__)]


def laws(group: str) -> tuple[Callable, ...]:
    """The laws of a group; each takes (part, device)."""
    if group == "forms":
        from adapterhub.testing.forms import LAWS
    elif group == "methods":
        from adapterhub.testing.methods import LAWS
    elif group in ("objectives", "recipes", "schedules", "verifiers"):
        from adapterhub.testing.ingredients import LAWS as of_group

        LAWS = of_group[group]
    elif group == "mergers":
        from adapterhub.testing.mergers import LAWS
    else:
        from adapterhub.testing.codecs import LAWS
    return LAWS


def _tried(group: str, name: str, law: Callable, part: type, device: str) -> Result:
    from adapterhub.testing.forms import Declined

    try:
        law(part, device)
    except Declined as reason:
        return Result(group, name, law.__name__, "declined", str(reason))
    except Exception as error:  # whatever a part raises under a law is that law's failure, told in its table
        return Result(group, name, law.__name__, "failed", _detail(part, error))
    return Result(group, name, law.__name__, "passed")


def _detail(part: type, error: Exception) -> str:
    """The cause in one line, and the author's."""
    words = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or "it says nothing"
    if not isinstance(error, AssertionError):
        words = f"{type(error).__name__}: {words}"
    *_, (last, _) = walk_tb(error.__traceback__)
    ours = last.f_globals.get("__name__", "").startswith(
        "adapterhub.testing"
    )  # the law speaks, and no line of the part's
    line = author_line(part, None if ours and not getattr(error, "fault", None) else error)
    return f"{words} ({line})" if line else words
