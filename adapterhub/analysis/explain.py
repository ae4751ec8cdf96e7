"""Why an expression will or will not run, step by step, and what to type next. What needs torch is in `rehearse`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict
from shlex import quote
from typing import Any

from adapterhub import plugins
from adapterhub.analysis.doctor import needs
from adapterhub.analysis.program import Program, Step, children, forms_at, problem, pruned
from adapterhub.analysis.sites import alike, by_layer
from adapterhub.bases.agreement import common_base
from adapterhub.errors import HubError
from adapterhub.spec.expression import Ensemble, Gate, Mix, Node, Ref, Scale, Stack, references
from adapterhub.spec.names import Reference
from adapterhub.spec.parents import warn_missing_parents, weighed
from adapterhub.spec.parser import parse
from adapterhub.store.expand import expand
from adapterhub.store.index import kind
from adapterhub.store.releases import Releases


def explain(hub: Releases, expression: str, base: object = None) -> dict[str, Any]:
    """Why an expression will or will not run on a base, as plain data.

    {"expression", "base", "runs", "steps": [{"name", "state", "told", "details", "hint"}], "next"}. runs: no step is a
    problem (without a base: none was found so far). next: what to type. What a base says is told by its config.json and
    its fingerprint; its weights are not loaded. Raises nothing that a user can cause in the expression or the base."""
    steps = list(_steps(hub, expression, base))
    stopped = next((step for step in steps if step.state == "problem"), None)
    if stopped is not None:
        following = stopped.hint
    elif base is None:
        following = f"adapterhub explain {quote(expression)} --base NAME"
    else:
        following = f"adapterhub run {quote(expression)} --base {quote(str(base))} --prompt TEXT"
    return {
        "expression": expression,
        "base": None if base is None else str(base),
        "runs": stopped is None,
        "steps": [asdict(step) for step in steps],
        "next": following,
    }


def _steps(hub: Releases, text: str, base: object) -> Iterator[Step]:
    """Until a problem leaves the others nothing to look at."""
    try:
        node = hub.read(text)
    except HubError as error:
        yield problem("expression", error)
        return
    yield Step("expression", "ok", f"it parses: {node}")
    names = _names(hub, node)
    yield names
    if names.state == "problem":
        return
    try:
        whole = expand(hub, node)
    except HubError as error:
        yield problem("compositions", error)
        return
    leaves = dict.fromkeys(map(str, references(whole)))
    program = Program(hub, text, whole, {name: hub.resolve(name) for name in leaves})
    yield Step("program", "ok", f"{len(leaves)} adapters" if len(leaves) != 1 else "1 adapter", _tree(hub, node))
    yield _parents(program)
    parts = _parts(program)
    yield parts
    yield _bases(program)
    yield Step("sites", "ok", *_sites(program))
    if parts.state == "problem":  # nothing can be loaded
        return
    from adapterhub.analysis.rehearse import rehearse

    yield from rehearse(program, base)


def _names(hub: Releases, node: Node) -> Step:
    found, errors = [], []
    for reference in dict.fromkeys(references(node)):
        try:
            release = hub.resolve(reference)
            pinned = str(release) if str(reference) == str(release) else f"{reference} is {release}"
            found.append(f"{pinned}, {kind(release.manifest)}, for {release.manifest.base.name}")
        except HubError as error:
            errors.append(error)
            found.append(f"{reference}: {error}")
    if errors:
        return Step("names", "problem", str(errors[0]), found, errors[0].hint)
    return Step("names", "ok", "every name is known", found)


def _tree(hub: Releases, node: Node | Ensemble) -> list[str]:
    """The program as an indented tree; a composition or a trained gate is opened where it first stands."""
    lines: list[str] = []
    opened: set[str] = set()

    def show(node: Node | Ensemble | None, indent: int) -> None:
        told, inner = _shown(hub, node)
        lines.append(f"{'  ' * indent}{told}")
        if isinstance(node, Ref):
            inner = [] if told in opened else inner
            opened.add(told)
        for child in inner:
            show(child, indent + 1)

    show(node, 0)
    return lines


def _shown(hub: Releases, node: Node | Ensemble | None) -> tuple[str, list[Node | None]]:
    """A node in words, and what to show beneath it."""
    match node:
        case None:
            return "the bare base", []
        case Ref(reference):
            release = hub.resolve(reference)
            manifest = release.manifest
            if manifest.compose is not None:
                return f"{release}: {manifest.compose}", [parse(manifest.compose)]
            if below := weighed(manifest):
                return f"gate {release}, which weighs at every token", [
                    Ref(Reference(p.name, p.version)) for p in below
                ]
            return f"{release} ({', '.join(sorted({form for here in manifest.forms.values() for form in here}))})", []
        case Scale(weight, inner):
            return f"{weight:g} times the change of", [inner]
        case Stack(nodes):
            return "stack, one after the other", list(nodes)
        case Mix(nodes):
            return "mix, side by side", list(nodes)
        case Gate(gate, nodes):
            return f"gate {hub.resolve(gate)}, which weighs at every token", list(nodes)
        case Ensemble(lanes):
            shares = ", ".join(f"{weight:g}" for weight, _ in lanes)
            return f"logits, the weighted sum ({shares}) of what these models put out", [inner for _, inner in lanes]
    return f"{type(node).__name__.lower()}: {node}", list(children(node))


def _parents(program: Program) -> Step:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_missing_parents(list(program.releases.values()))
    if caught:
        details = [str(warning.message) for warning in caught]
        return Step(
            "parents",
            "note",
            "an adapter lacks what it was trained over",
            details,
            "put it beneath: 'parent + adapter'",
        )
    return Step("parents", "ok", "what was trained over another has it beneath, or nothing was")


def _parts(program: Program) -> Step:
    """Are the forms and codecs of every adapter installed, and do they import?"""
    needed: dict[tuple[str, str], list[str]] = {}
    makers: dict[tuple[str, str], str] = {}
    for name, release in program.releases.items():
        for part, maker in needs(release).items():
            needed.setdefault(part, []).append(name)
            makers.setdefault(part, maker)
    told, faults = [], []
    for (group, part), users in sorted(needed.items()):
        try:
            plugins.load(group, part)
            told.append(f"{group[:-1]} {part}, from {plugins.distribution(group, part)}")
        except HubError as error:
            maker = makers[group, part]
            hint = (
                f"{users[0]} was made with {maker}: install that package from a source you trust"
                if maker
                else error.hint
            )
            told.append(f"{group[:-1]} {part}: {error} (needed by {', '.join(users)})")
            faults.append((error, hint))
    if faults:
        return Step("parts", "problem", str(faults[0][0]), told, faults[0][1])
    return Step("parts", "ok", "every form and codec is installed", told)


def _bases(program: Program) -> Step:
    releases = list(program.releases.values())
    if not releases:
        return Step("bases", "ok", "the bare base, whichever it is")
    try:
        base = common_base(program.hub, releases)
    except HubError as error:
        return problem("bases", error)
    return Step(
        "bases", "ok", f"made for {base.name} ({base.architecture})" + (", all of them" if len(releases) > 1 else "")
    )


def _sites(program: Program) -> tuple[str, list[str]]:
    """What runs where, in order: sites that only their layer tells apart are one line."""
    groups: dict[tuple[str, str], int] = {}
    at = forms_at(program)
    for path in sorted(at, key=by_layer):
        here = pruned(program.node, lambda reference, here=at[path]: str(reference) in here)
        forms = "; ".join(", ".join(at[path][name]) for name in at[path])
        key = alike(path), f"{here}: {forms}"
        groups[key] = groups.get(key, 0) + 1
    return f"{len(at)} of them, each in this order", [
        f"{pattern} x{n}  {what}" for (pattern, what), n in groups.items()
    ]
