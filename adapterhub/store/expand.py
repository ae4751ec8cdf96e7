"""Names in an expression made exact, and saved compositions replaced by what they are made of. No torch."""

from __future__ import annotations

from adapterhub.errors import HubError, UsageError
from adapterhub.spec.expression import Ensemble, Gate, Node, Ref, depth, substitute
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import Reference
from adapterhub.spec.parents import check_expressions, weighed
from adapterhub.spec.parser import parse
from adapterhub.store.releases import Releases


def pin(hub: Releases, node: Node | Ensemble) -> Node | Ensemble:
    """The same expression with every name at an exact version."""

    def exact(reference: Reference) -> Node:
        release = hub.resolve(reference)
        return Ref(Reference(release.name, release.version))

    return substitute(node, exact)


NESTED = 100
"""How deep the whole may be, compositions inside one another included: whoever walks it calls itself as often."""
LARGEST = 10_000
"""Adapters that an expression may come to, each counted as often as it stands there."""


def expand(hub: Releases, node: Node | Ensemble) -> Node | Ensemble:
    """The same expression with saved compositions replaced by what they are made of, gates with what they weigh, all
    names exact.

    Raises HubError for one that grows without reason: compositions of compositions can double at every step."""
    known: dict[str, tuple[Node, int, int]] = {}

    def whole(node: Node, under: int) -> tuple[Node, int, int]:
        """The expanded node, how many adapters stand in it, and how deep it is; `under`: what it lies in."""
        count, below = 0, 0

        def inner(reference: Reference) -> Node:
            nonlocal count, below
            release = hub.resolve(reference)
            if str(release) not in known:
                known[str(release)] = made_of(release)
            part, parts, deep = known[str(release)]
            if isinstance(part, Ensemble) and not isinstance(node, Ref):
                raise UsageError(
                    f"{reference} weighs whole models ({part}), so it cannot be a part of another expression",
                    "use it by itself",
                )
            count, below = count + parts, max(below, deep)
            if count > LARGEST or under + depth(node) + below > NESTED:
                raise HubError(
                    f"{reference} is made of more than {LARGEST} adapters, or more than {NESTED} deep",
                    "compose it of fewer",
                )
            return part

        def made_of(release: Release) -> tuple[Node, int, int]:
            own = Reference(release.name, release.version)
            if children := weighed(release.manifest):
                parts = [whole(Ref(Reference(p.name, p.version)), under + 1) for p in map(hub.exact, children)]
                node = Gate(own, tuple(part for part, _, _ in parts))
                return node, 1 + sum(count for _, count, _ in parts), 1 + max(deep for _, _, deep in parts)
            if release.manifest.compose is None:
                return Ref(own), 1, 0
            check_expressions(release.manifest)
            for parent in release.manifest.parents:
                hub.exact(parent)
            if under > NESTED:
                raise HubError(f"{release} lies in compositions more than {NESTED} deep", "compose it of fewer")
            return whole(parse(release.manifest.compose), under + 1)

        expanded = substitute(node, inner)
        return expanded, count, depth(node) + below

    return whole(node, 0)[0]
