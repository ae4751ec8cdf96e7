"""What a release says of itself, bounded: how much a manifest may hold, and the shapes of what our own code reads out of it.

Checked once, when a manifest is decoded. Metrics are what their author's code wrote and nothing of ours depends on them: any plain
values within bounds may stand there, and `figures` picks out those that have the shape that we know."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

LARGEST = 32 << 20
"""Bytes of a manifest."""
LINE = 1024
"""Characters of what a list shows: a licence, a base's name, a path, a reason, a date."""
TEXT = 1 << 20
"""Characters of a text elsewhere: an expression, a note in a recipe."""
_NUMBERS = {
    "compress": ("bytes_before", "bytes_bf16", "bytes_after", "worst_error", "median_error"),
    "merge": ("relative_error", "largest_rank"),
}


def figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the metrics that our own verbs write, each only if it has the shape that they write: "train_loss" a number,
    "compress" and "merge" tables with their numbers, "eval" a table."""
    known = {}
    if _number(metrics.get("train_loss")):
        known["train_loss"] = metrics["train_loss"]
    for what, numbers in _NUMBERS.items():
        table = metrics.get(what)
        if isinstance(table, dict) and all(_number(table.get(key)) for key in numbers):
            known[what] = table
    if isinstance(metrics.get("eval"), dict):
        known["eval"] = metrics["eval"]
    if known.get("compress", {}).get("bytes_after", 1) <= 0:
        del known["compress"]
    return known


def _number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def line(text: object, what: str) -> str:
    """The text itself, if it is one line that a list may show. Raises ValueError."""
    if not isinstance(text, str) or len(text) > LINE or not text.isprintable():
        raise ValueError(f"{what} is {ascii(text)[:80]}, not one printable line of at most 1024 characters")
    return text


def date(text: object, what: str = "the date") -> str:
    """The text itself, if it is a date and time as ISO 8601 has it. Raises ValueError."""
    try:
        datetime.fromisoformat(line(text, what))
    except ValueError:
        raise ValueError(f"{what} is {ascii(text)[:80]}, not a date as ISO 8601 has it") from None
    return text


def count(value: object, what: str) -> int:
    """The number itself, if it is a whole one from 0 to 2^63. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{what} is {ascii(value)[:80]}, not a count")
    return value


def check_listed(created: object, yanked: object, tags: object) -> None:
    """Raise ValueError for what no list of releases says of one: when it came (a date, or "" where it is not known), why it should no
    longer be chosen (a short text, or None), and its tags."""
    if created != "":
        date(created, "the date of a release")
    if yanked is not None:
        line(yanked, "the reason of a yank")
    if not isinstance(tags, list | tuple) or len(tags) > 1000:
        raise ValueError("its tags are not a list of at most 1000")
    for tag in tags:
        line(tag, "a tag")
