"""Regular expressions from a file that nobody vouches for, matched under a limit.

Python's matcher can take exponential time, and cannot be interrupted. The library `regex` can, and reads an expression as `re` does
once what only it knows is refused. It copies what is repeated (`(a{1000}){1000}` a million times), so sizes are bounded first.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from re import _constants, _parser
from typing import Any

SECONDS = 2
"""Of computing, for all the expressions and texts of a call together."""
LENGTH = 200_000
"""Characters of the expressions of a call together."""
SIZE = 400_000
"""Characters, sets and groups in them, each as often as it is repeated."""
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
_FOREIGN = re.compile(r"\{[^\d,}]|\[:")
"""Fuzzy matching and POSIX classes: `regex` knows them, and `re` reads them as plain characters."""


class BadExpression(ValueError):
    """An expression that does not compile, that is too large, or that took too long."""


def match(expressions: Sequence[str], texts: Sequence[str], whole: bool = False) -> list[dict[str, str]]:
    """For each expression {text: group "idx" ("" without one)} of the texts that it matches: from their start
    (`re.match`), or as a whole (`re.fullmatch`). Raises BadExpression."""
    compiled = _compiled(expressions)
    end, found = time.process_time() + SECONDS, []
    for expression in compiled:
        hits, run = {}, expression.fullmatch if whole else expression.match
        for text in texts:
            try:
                hit = run(text, timeout=max(1e-3, end - time.process_time()))
            except (TimeoutError, MemoryError):
                hit = None
                end = 0.0
            if time.process_time() > end:
                raise BadExpression(f"an expression takes more than {SECONDS} s")
            if hit:
                hits[text] = hit.groupdict().get("idx") or ""
        found.append(hits)
    return found


def _compiled(expressions: Sequence[str]) -> list[Any]:
    import regex

    if sum(map(len, expressions)) > LENGTH:
        raise BadExpression(f"the expressions have more than {LENGTH} characters")
    size = 0
    for expression in expressions:
        try:
            re.compile(expression)
            size += _size(_parser.parse(expression))
        except (re.error, OverflowError, RecursionError) as error:
            raise BadExpression(f"{type(error).__name__}: {error}") from None
        if size > SIZE:
            raise BadExpression(f"what is repeated in them comes to more than {SIZE} characters")
        if foreign := _FOREIGN.search(expression):
            raise BadExpression(f"{foreign[0]!r} in it is written as no expression of Python's is: escape it")
    try:
        return [regex.compile(expression) for expression in expressions]
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise BadExpression(f"{type(error).__name__}: {error}") from None


def _size(node: Any) -> int:
    """What the compiled expression comes to when repeated parts are copied."""
    if isinstance(node, tuple) and len(node) == 2 and node[0] in _REPEATS:
        low, high, inner = node[1]
        return max(low, 0 if high is _constants.MAXREPEAT else high, 1) * _size(inner)
    if isinstance(node, _parser.SubPattern | list | tuple):
        return 1 + sum(map(_size, node))
    return 0
