"""The expression language of compositions: `0.7*me/a + me/b`, `mix(0.3*a, 0.7*b)`, `a - 0.5*(b + c)`.

    expression := term ((" + " | " - ") term)*        a stack: an ordered program, left first
    term       := [number "*"] atom                   its change, scaled
    atom       := name ["@" version or tag] | "(" expression ")" | "mix(" expression ("," expression)* ")"

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


Node = Ref | Scale | Stack | Mix

DEEPEST = 100
"""Parentheses, mixes and factors inside one another; whoever walks the tree calls itself as often."""
_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?(?=\s*\*)")
_NAME = re.compile(rf"(?:{PART}/)?{PART}(?:@[A-Za-z0-9._-]+)?")


def parse(text: str) -> Node:
    """The expression as a tree. Raises ExpressionError with a caret under the place."""
    parser = _Parser(text)
    node = parser.expression()
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
        while True:
            self.skip()
            sign = self.text[self.at : self.at + 1]
            if sign not in ("+", "-") or not sign:
                break
            if self.text[self.at - 1] != " " or self.text[self.at + 1 : self.at + 2] not in (" ", ""):
                self.fail(f"a {sign} between adapters needs a space on both sides", f"write: a {sign} b")
            self.at += 1
            self.depth += sign == "-"  # a factor -1, which is printed as one
            nodes.append(self.term() if sign == "+" else negated(self.term()))
            self.depth -= sign == "-"
        return nodes[0] if len(nodes) == 1 else Stack(tuple(nodes))

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
        if number := _NUMBER.match(self.text, self.at):
            if not isfinite(float(number[0])):
                self.fail("a weight must be a finite number", "for example 0.5*name")
            self.at = number.end()
            self.take("*")
            return Scale(float(number[0]), self.term())
        return self.atom()

    def atom(self) -> Node:
        if self.take("mix("):
            nodes = [self.expression()]
            while self.take(","):
                nodes.append(self.expression())
            self.close()
            return Mix(tuple(nodes))
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
            self.fail(f"there is no composer named {name[0]!r}", "composers: mix(a, b)")
        self.at = name.end()
        return Ref(reference)

    def close(self) -> None:
        if not self.take(")"):
            self.fail("a closing parenthesis is missing", "each ( needs its )")


def negated(node: Node) -> Node:
    """The node with its change subtracted."""
    return replace(node, weight=-node.weight) if isinstance(node, Scale) else Scale(-1.0, node)


def references(node: Node) -> Iterator[Reference]:
    """Every reference, in order, repeats included."""
    match node:
        case Ref(reference):
            yield reference
        case Scale(_, inner):
            yield from references(inner)
        case Stack(nodes) | Mix(nodes):
            for inner in nodes:
                yield from references(inner)


def beneath(node: Node, name: str) -> str | None:
    """What stands under the last of a stack, if that is `name` as it is; None if the expression has another shape."""
    if isinstance(node, Stack) and str(node.nodes[-1]) == name and name not in map(str, _leaves(node.nodes[:-1])):
        return " + ".join(map(str, node.nodes[:-1]))
    return None


def _leaves(nodes: tuple[Node, ...]) -> Iterator[Reference]:
    for node in nodes:
        yield from references(node)


def depth(node: Node) -> int:
    """How many operations lie over its deepest adapter."""
    match node:
        case Ref():
            return 0
        case Scale(_, inner):
            return 1 + depth(inner)
        case Stack(nodes) | Mix(nodes):
            return 1 + max(map(depth, nodes))


def substitute(node: Node, change: Callable[[Reference], Node]) -> Node:
    """The same tree with every reference replaced by change(reference)."""
    match node:
        case Ref(reference):
            return change(reference)
        case Scale(weight, inner):
            return Scale(weight, substitute(inner, change))
        case Stack(nodes):
            return Stack(tuple(substitute(inner, change) for inner in nodes))
        case Mix(nodes):
            return Mix(tuple(substitute(inner, change) for inner in nodes))
