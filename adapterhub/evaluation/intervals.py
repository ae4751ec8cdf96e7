"""Intervals: Wilson's for shares, paired differences for two runs on the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adapterhub.errors import UsageError

Z = 1.959964
"""The normal quantile of a two-sided 95 % interval."""


def wilson(right: int, n: int) -> list[float]:
    """The 95 % score interval of a share (Wilson, 1927)."""
    share, spread = right / n, Z * Z / n
    centre, half = share + spread / 2, Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # Rounded, so that none right begins at 0 and all right ends at 1.
    return [round((centre - half) / (1 + spread), 12) + 0.0, round((centre + half) / (1 + spread), 12)]


def paired(before: Mapping[str, Any], after: Mapping[str, Any], metric: str = "label") -> dict[str, Any]:
    """after - before in a share, on the same rows of the same file: two results of `evaluate`.

    The 95 % interval is Agresti and Min's (2005) for matched pairs: Wald's with half a row added to each cell.
    Raises UsageError if the rows are not the same."""
    ones, twos = before["rows"], after["rows"]
    if before["data"] != after["data"] or [row["line"] for row in ones] != [row["line"] for row in twos]:
        raise UsageError("these results are not of the same rows", "evaluate both on the same file with the same limit")
    if metric not in ones[0] or metric not in twos[0] or metric == "loss":
        raise UsageError(f"no {metric!r} of each row in both results", "measure it in both: exact or label")
    gained = sum(b[metric] and not a[metric] for a, b in zip(ones, twos, strict=True))
    lost = sum(a[metric] and not b[metric] for a, b in zip(ones, twos, strict=True))
    n = len(ones)
    centre = (gained - lost) / (n + 2)
    half = Z * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    return {
        "difference": (gained - lost) / n,
        "interval": [max(-1.0, centre - half), min(1.0, centre + half)],
        "gained": gained,
        "lost": lost,
        "n": n,
    }
