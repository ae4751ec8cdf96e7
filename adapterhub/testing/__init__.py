"""The laws every installed part must hold, ours or not: they are the definition of the abstraction.

`adapterhub plugins check NAME` runs them over a part; `check("loreft")` does the same in a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adapterhub import plugins
from adapterhub.errors import PluginError


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


def check(name: str, device: str = "cpu") -> list[Result]:
    """Every law over every installed part of that name (a package may bring a form and a method of one name).

    Raises PluginError if nothing is installed under the name."""
    groups = [group for group in TRIED if name in plugins.names(group)]
    if not groups:
        raise PluginError(f"no part with laws is named {name!r}", "see: adapterhub plugins list")
    return [result for group in groups for result in check_part(group, name, device)]


def check_part(group: str, name: str, device: str = "cpu") -> list[Result]:
    """Every law of its group over one installed part."""
    part = plugins.load(group, name)
    return [_tried(group, name, law, part, device) for law in laws(group)]


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
        return Result(group, name, law.__name__, "failed", f"{type(error).__name__}: {error}")
    return Result(group, name, law.__name__, "passed")
