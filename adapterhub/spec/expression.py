"""The expression language of compositions: `0.7*me/a + me/b`, `mix(0.3*a, 0.7*b)`, `a - 0.5*(b + c)`.

    whole      := expression | "logits(" lane ((" + " | " - ") lane)* ")"
    lane       := [number "*"] ("base" | atom)        what a whole model puts out, weighed
    expression := term ((" + " | " - ") term)*        a stack: an ordered program, left first
    term       := [number "*"] atom                   its change, scaled
    atom       := name ["@" version or tag] | "(" expression ")" | "mix(" expression ("," expression)* ")"
                  | "gate(" name ("," expression)+ ")"

Names may hold `-` and `.`, so a binary + or - needs a space on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from adapterhub.spec.names import Reference


@dataclass(frozen=True)
class Ref:
    """One adapter."""

    reference: Reference

    def __str__(self) -> str:
        return str(self.reference)


@dataclass(frozen=True)
class Scale:
    """The change of `node`, multiplied by weight."""

    weight: float
    node: Node

    def __str__(self) -> str:
        inner = f"({self.node})" if isinstance(self.node, Stack) else str(self.node)
        return f"{self.weight!r}*{inner}"


@dataclass(frozen=True)
class Stack:
    """One after the other: each sees what those before it left."""

    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        return " + ".join(f"({node})" if isinstance(node, Stack) else str(node) for node in self.nodes)


@dataclass(frozen=True)
class Mix:
    """Side by side: all see the same hidden states, and their changes are added."""

    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        return f"mix({', '.join(map(str, self.nodes))})"


@dataclass(frozen=True)
class Gate:
    """A trained gate over others: it weighs their changes anew at every token."""

    gate: Reference
    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        return f"gate({', '.join(map(str, (self.gate, *self.nodes)))})"


@dataclass(frozen=True)
class Ensemble:
    """The weighted sum of what whole models put out: (weight, what runs; None: the bare base). Only ever the root."""

    lanes: tuple[tuple[float, Node | None], ...]

    def __str__(self) -> str:
        text = ""
        for weight, node in self.lanes:
            sign, size = (" - " if weight < 0 else " + "), abs(weight)
            inner = "base" if node is None else f"({node})" if isinstance(node, Stack | Scale) else str(node)
            text += (sign if text else sign.strip(" +")) + (inner if size == 1 else f"{size!r}*{inner}")
        return f"logits({text})"


Node = Ref | Scale | Stack | Mix | Gate


def negated(node: Node) -> Node:
    """The node with its change subtracted."""
    return replace(node, weight=-node.weight) if isinstance(node, Scale) else Scale(-1.0, node)


def references(node: Node | Ensemble) -> Iterator[Reference]:
    """Every reference, in order, repeats included."""
    match node:
        case Ref(reference):
            yield reference
        case Scale(_, inner):
            yield from references(inner)
        case Stack(nodes) | Mix(nodes):
            for inner in nodes:
                yield from references(inner)
        case Gate(gate, nodes):
            yield gate
            for inner in nodes:
                yield from references(inner)
        case Ensemble(lanes):
            for _, inner in lanes:
                yield from references(inner) if inner is not None else ()


def beneath(node: Node, name: str) -> str | None:
    """What stands under the last of a stack, if that is `name` as it is; None if the expression has another shape."""
    if isinstance(node, Stack) and str(node.nodes[-1]) == name and name not in map(str, _leaves(node.nodes[:-1])):
        return " + ".join(map(str, node.nodes[:-1]))
    return None


def _leaves(nodes: tuple[Node, ...]) -> Iterator[Reference]:
    for node in nodes:
        yield from references(node)


def depth(node: Node | Ensemble) -> int:
    """How many operations lie over its deepest adapter."""
    match node:
        case Ref():
            return 0
        case Scale(_, inner):
            return 1 + depth(inner)
        case Stack(nodes) | Mix(nodes) | Gate(_, nodes):
            return 1 + max(map(depth, nodes))
        case Ensemble(lanes):
            return 1 + max(depth(inner) for _, inner in lanes if inner is not None) if any(n for _, n in lanes) else 0


def substitute(node: Node | Ensemble, change: Callable[[Reference], Node]) -> Node | Ensemble:
    """The same tree with every reference replaced by change(reference); of a gate that is the gate itself."""
    match node:
        case Ref(reference):
            return change(reference)
        case Scale(weight, inner):
            return Scale(weight, substitute(inner, change))
        case Stack(nodes):
            return Stack(tuple(substitute(inner, change) for inner in nodes))
        case Mix(nodes):
            return Mix(tuple(substitute(inner, change) for inner in nodes))
        case Gate(gate, nodes):
            own = change(gate)
            own = own.gate if isinstance(own, Gate) else own.reference if isinstance(own, Ref) else gate
            return Gate(own, tuple(substitute(inner, change) for inner in nodes))
        case Ensemble(lanes):
            return Ensemble(tuple((w, None if n is None else substitute(n, change)) for w, n in lanes))
