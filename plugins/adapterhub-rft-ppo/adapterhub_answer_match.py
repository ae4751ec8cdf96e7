"""A verifier that reads an answer out of a text and compares it with the one that the data has."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from adapterhub import Verdict, Verifier
from adapterhub.errors import UsageError
from adapterhub.formats.peft.bounded_re import BadExpression, match

WRONG = 0.1
"""The reward of an answer that can be read and is wrong (Luong et al., 2024)."""
MARK = re.compile(r"=|\banswer\b", re.IGNORECASE)
NUMBER = re.compile(r"(?<!\w)[-+]?(?:\d{1,3}(?:,\d{3}){1,9}|\d{1,40})(?:\.\d{1,40})?(?!\w)")
WORD = re.compile(r"\w+")


class AnswerMatch(Verifier):
    """1 if the answer read from the text is the reference's, 0.1 if another, 0 if none can be read."""

    @dataclass(frozen=True)
    class Config:
        pattern: str | None = None
        """Where the answer is: a regular expression with a group named `answer`; the last match counts. None: the first number
        after the last "=" or word "answer", else the last word there; without either in the text its last number, else its last word."""
        tolerance: float = 1e-6
        """Numbers count as equal that differ by no more than this, absolutely or of the larger."""

        def __post_init__(self) -> None:
            if not 0 <= self.tolerance < 1:
                raise UsageError(
                    f"a tolerance of {self.tolerance}", "give at least 0 and below 1, for example 0.000001"
                )
            if self.pattern is not None:
                if self.pattern.count("(?P<answer>") != 1:
                    raise UsageError(
                        f"the pattern {self.pattern!r} has not one group named answer",
                        r"for example is (?P<answer>\d+)",
                    )
                try:
                    match([_last(self.pattern)], [])
                except BadExpression as error:
                    raise UsageError(
                        f"the pattern {self.pattern!r} is no expression: {error}", "see Python's re"
                    ) from None

    def verify(self, prompt: str, reference: str, answer: str) -> Verdict:
        try:
            wanted, got = self.read([reference, answer])
        except BadExpression as error:
            return Verdict(0.0, f"{error}: {answer[:60]!r}")
        if not got:
            return Verdict(0.0, f"no answer can be read in {answer[:60]!r}")
        if not wanted:
            return Verdict(0.0, f"no answer can be read in the reference {reference[:60]!r}")
        if _equal(wanted, got, self.config.tolerance):
            return Verdict(1.0, f"{got[:60]!r} is right")
        return Verdict(WRONG, f"{got[:60]!r} is not {wanted[:60]!r}")

    def read(self, texts: Sequence[str]) -> list[str]:
        """The answers; "" where none can be read. Raises BadExpression for a pattern that takes too long."""
        if self.config.pattern is None:
            return [_answer(text) for text in texts]
        (found,) = match([_last(self.config.pattern)], texts)
        return [found.get(text, "").strip() for text in texts]


def _last(pattern: str) -> str:
    """An expression that finds the pattern's last match from a text's start, its group as `match` wants it."""
    return f"(?s:.*)(?:{pattern.replace('(?P<answer>', '(?P<idx>')})"


def _answer(text: str) -> str:
    marks = list(MARK.finditer(text))
    text = text[marks[-1].end() :] if marks else text
    numbers, words = NUMBER.findall(text), WORD.findall(text)
    return numbers[0 if marks else -1] if numbers else words[-1] if words else ""


def _equal(first: str, second: str, tolerance: float) -> bool:
    """As numbers where both are, else as texts, whatever their case."""
    numbers = [_number(first), _number(second)]
    if None in numbers:
        return first.casefold() == second.casefold()
    return math.isclose(*numbers, rel_tol=tolerance, abs_tol=tolerance)


def _number(text: str) -> float | None:
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
