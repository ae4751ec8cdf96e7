"""A program as the steps of `explain` see it, and what a step finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace

from adapterhub.errors import HubError
from adapterhub.sites import current_path
from adapterhub.spec.expression import Ensemble, Mix, Node, Ref, Scale, Stack, references
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import Reference
from adapterhub.store.releases import Releases


@dataclass(frozen=True)
class Step:
    """One thing that was looked at."""

    name: str
    state: str
    """"ok"; "note": it runs, but one should know; "problem": it does not run."""
    told: str
    details: list[str] = field(default_factory=list)
    hint: str = ""
    """Of a problem or a note: what to do."""


@dataclass(frozen=True)
class Program:
    """An expression whose names are all known: what the steps after that look at."""

    hub: Releases
    text: str
    node: Node | Ensemble
    """Names exact, compositions replaced by what they are made of, gates with what they weigh."""
    releases: dict[str, Release]
    """By "name@version", in the order of the expression."""


def problem(name: str, error: HubError) -> Step:
    """An error as a step."""
    told, *details = str(error).splitlines()
    return Step(name, "problem", told, details, error.hint)


def children(node: Node | Ensemble) -> Iterator[Node]:
    """What a node of any kind is made of."""
    waiting = [getattr(node, entry.name) for entry in fields(node)]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, tuple):
            waiting = [*value, *waiting]
        elif is_dataclass(value) and not isinstance(value, Reference):
            yield value


def forms_at(program: Program) -> dict[str, dict[str, list[str]]]:
    """{site path: {"name@version": the forms there}}, paths as today's transformers has them."""
    at: dict[str, dict[str, list[str]]] = {}
    for name, release in program.releases.items():
        for path, forms in release.manifest.forms.items():
            at.setdefault(current_path(release.manifest.base.architecture, path), {})[name] = forms
    return at


def pruned(node: Node | Ensemble, keep: Callable[[Reference], bool]) -> Node | Ensemble | None:
    """The node without the adapters that are not kept; a gate, or a node of another kind, stays whole if any of its
    adapters does."""
    match node:
        case Ref(reference):
            return node if keep(reference) else None
        case Scale(_, inner):
            inner = pruned(inner, keep)
            return inner and replace(node, node=inner)
        case Stack(nodes) | Mix(nodes):
            inner = tuple(kept for each in nodes if (kept := pruned(each, keep)) is not None)
            return inner[0] if len(inner) == 1 else replace(node, nodes=inner) if inner else None
        case Ensemble(lanes):
            return Ensemble(tuple((weight, inner and pruned(inner, keep)) for weight, inner in lanes))
    return node if any(map(keep, references(node))) else None
