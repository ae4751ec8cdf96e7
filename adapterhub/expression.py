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

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isfinite

from adapterhub.errors import ExpressionError, UsageError
from adapterhub.manifest import PART, Reference


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

DEEPEST = 100
"""Parentheses, mixes and factors inside one another; whoever walks the tree calls itself as often."""
_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?(?=\s*\*)")
_NAME = re.compile(rf"(?:{PART}/)?{PART}(?:@[A-Za-z0-9._-]+)?")


def parse(text: str) -> Node | Ensemble:
    """The expression as a tree. Raises ExpressionError with a caret under the place."""
    parser = _Parser(text)
    node = parser.ensemble() if parser.take("logits(") else parser.expression()
    parser.skip()
    if parser.at < len(text):
        parser.fail(
            "this does not belong to an expression",
            "join adapters with ' + ' or ' - ' (with spaces) and scale with 0.5*name",
        )
    return node


class _Parser:
    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def fail(self, problem: str, hint: str):
        raise ExpressionError(self.text, self.at, problem, hint)

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1

    def take(self, token: str) -> bool:
        self.skip()
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def expression(self) -> Node:
        nodes = [self.term()]
        while sign := self.sign():
            self.depth += sign == "-"  # a factor -1, which is printed as one
            nodes.append(self.term() if sign == "+" else negated(self.term()))
            self.depth -= sign == "-"
        return nodes[0] if len(nodes) == 1 else Stack(tuple(nodes))

    def sign(self) -> str:
        """The + or - that goes on here; "" if none does."""
        self.skip()
        sign = self.text[self.at : self.at + 1]
        if sign not in ("+", "-") or not sign:
            return ""
        if self.text[self.at - 1] != " " or self.text[self.at + 1 : self.at + 2] not in (" ", ""):
            self.fail(f"a {sign} between adapters needs a space on both sides", f"write: a {sign} b")
        self.at += 1
        return sign

    def ensemble(self) -> Ensemble:
        self.skip()
        lanes, sign = [], "-" if self.text.startswith("-", self.at) and not _NUMBER.match(self.text, self.at) else "+"
        self.at += sign == "-"
        while sign:
            self.skip()
            weight = 1.0
            if _NUMBER.match(self.text, self.at):
                weight = self.number()
                self.skip()
            bare = re.compile(r"base(?![a-z0-9._/@-])").match(self.text, self.at)
            self.at = bare.end() if bare else self.at
            lanes.append((weight if sign == "+" else -weight, None if bare else self.atom()))
            sign = self.sign()
        self.close()
        return Ensemble(tuple(lanes))

    def term(self) -> Node:
        """Every nesting goes through here."""
        self.skip()
        if self.depth > DEEPEST:
            self.fail(f"this is nested more than {DEEPEST} deep", "save a part of it with adapterhub compose")
        self.depth += 1
        node = self.factors()
        self.depth -= 1
        return node

    def factors(self) -> Node:
        return Scale(self.number(), self.term()) if _NUMBER.match(self.text, self.at) else self.atom()

    def number(self) -> float:
        """A factor and its star."""
        number = _NUMBER.match(self.text, self.at)
        if not isfinite(float(number[0])):
            self.fail("a weight must be a finite number", "for example 0.5*name")
        self.at = number.end()
        self.take("*")
        return float(number[0])

    def atom(self) -> Node:
        if self.take("mix("):
            nodes = [self.expression()]
            while self.take(","):
                nodes.append(self.expression())
            self.close()
            return Mix(tuple(nodes))
        if self.take("gate("):
            self.skip()
            start, gate, nodes = self.at, self.expression(), []
            if not isinstance(gate, Ref):
                self.at = start
                self.fail("a gate's own name comes first", "for example: gate(me/router, me/a, me/b)")
            while self.take(","):
                nodes.append(self.expression())
            if not nodes:
                self.fail("a gate weighs something", f"for example: gate({gate}, me/a, me/b)")
            self.close()
            return Gate(gate.reference, tuple(nodes))
        if self.text.startswith("logits(", self.at):
            self.fail("logits(...) weighs whole models, so it stands alone", "write it around everything")
        if self.take("("):
            node = self.expression()
            self.close()
            return node
        name = _NAME.match(self.text, self.at)
        if not name:
            self.fail("an adapter's name, a number or a parenthesis is expected here", "for example: 0.7*me/a + me/b")
        try:
            reference = Reference.parse(name[0])
        except UsageError as error:
            self.fail(str(error), error.hint)
        if self.text.startswith("(", name.end()):
            self.fail(
                f"there is no composer named {name[0]!r}",
                "composers: mix(a, b), gate(router, a, b), logits(base + a - b)",
            )
        self.at = name.end()
        return Ref(reference)

    def close(self) -> None:
        if not self.take(")"):
            self.fail("a closing parenthesis is missing", "each ( needs its )")


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
