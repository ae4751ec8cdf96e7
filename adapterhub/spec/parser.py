"""From the text of an expression to its tree."""

from __future__ import annotations

import re
from math import isfinite

from adapterhub.errors import ExpressionError, UsageError
from adapterhub.spec.expression import Ensemble, Gate, Mix, Node, Ref, Scale, Stack, negated
from adapterhub.spec.names import PART, Reference

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
