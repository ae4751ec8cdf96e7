"""Regular expressions from a file that nobody vouches for, matched under a limit.

Python's matcher can take exponential time, and cannot be interrupted. So this file runs itself as a process of its own,
which the operating system ends after a second of computing. It imports the standard library only.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 1
MEMORY = 512 << 20


class BadExpression(ValueError):
    """An expression that does not compile, or that took too long."""


def match(expressions: Sequence[str], texts: Sequence[str], whole: bool = False) -> list[dict[str, str]]:
    """For each expression {text: group "idx" ("" without one)} of the texts that it matches: from their start
    (`re.match`), or as a whole (`re.fullmatch`). Raises BadExpression."""
    if not expressions:
        return []
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__],
        input=json.dumps([list(expressions), list(texts), whole]).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise BadExpression(f"an expression takes more than {SECONDS} s")
    problem, found = json.loads(done.stdout)
    if problem:
        raise BadExpression(problem)
    return found


def _match(expressions: list[str], texts: list[str], whole: bool) -> list[dict[str, str]]:
    found = []
    for expression in map(re.compile, expressions):
        hits = {text: (expression.fullmatch if whole else expression.match)(text) for text in texts}
        found.append({text: hit.groupdict().get("idx") or "" for text, hit in hits.items() if hit})
    return found


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        answer = (None, _match(*json.load(sys.stdin)))
    except (re.error, OverflowError, RecursionError) as error:
        answer = (f"{type(error).__name__}: {error}", None)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
