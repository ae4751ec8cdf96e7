"""A scan of an adapter's weights, before it is believed: how large its changes are against the base's own weights.

The base is not loaded: its sketch holds whole rows of every tensor, whose mean square times the tensor's size is a good estimate of
its squared norm. A scan finds what is broken or absurd. It cannot find a backdoor: weights that do harm look like others.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from adapterhub.adapters.changes import change_of
from adapterhub.bases import sketch
from adapterhub.errors import NotFoldable, ScanWarning, UnsafeFile
from adapterhub.files.bounded import read_json
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.modification import Modification, Modifications
from adapterhub.tensors.factors import product_norm

LOUD = 3.0
"""A change of so many times the norm of the weight that it changes is told: training moves a weight by a fraction of it."""
ABSURD = 1000.0
"""A change of so many times is refused."""


def scan(parts: Modifications, base: bytes) -> dict[str, Any]:
    """{"sites", "measured", "rank", "relative", "site"}: how many sites; at how many the change of a weight could be held against
    the base's; the largest rank; the largest norm of a change over that of its weight, and where. base: its sketch."""
    structure, rows = sketch.unpack(base)
    shapes = read_json(structure)
    report: dict[str, Any] = {"sites": len(parts), "measured": 0, "rank": 0, "relative": 0.0, "site": ""}
    for path, here in sorted(parts.items()):
        report["rank"] = max([report["rank"], *(len(part.down) for part in here if isinstance(part, LowRank))])
        own = _own(path, shapes, rows)
        norm = _norm(here)
        if not own or norm is None:
            continue
        report["measured"] += 1
        if norm / own > report["relative"]:
            report |= {"relative": float(f"{norm / own:.4g}"), "site": path}
    return report


def check(report: dict[str, Any], name: str, force: bool = False) -> None:
    """Raise UnsafeFile for a change that is absurdly large, unless forced; warn (ScanWarning) of one that is very large."""
    told = f"{name} changes {report['site']} by {report['relative']:.3g} times the norm of the base's weight there"
    if report["relative"] > ABSURD and not force:
        raise UnsafeFile(told, "no training does that: look where it comes from, or --force")
    if report["relative"] > LOUD:
        warnings.warn(f"{told}: training moves a weight by a fraction of it", ScanWarning, stacklevel=3)


def _own(path: str, shapes: dict[str, list[int]], rows: dict[str, Any]) -> float | None:
    """The estimated Frobenius norm of the base's weight at a site; a sketch leaves out a prefix that all names share."""
    name = f"{path}.weight"
    while name not in rows and "." in name:
        name = name.partition(".")[2]
    if name not in rows or name == "weight" or not rows[name].numel():
        return None
    count = 1
    for n in shapes[name]:
        count *= n
    return float(rows[name].double().square().mean() * count) ** 0.5


def _norm(here: list[Modification]) -> float | None:
    """The Frobenius norm of what happens to the weight at a site; None where that is no change of a weight."""
    if len(here) == 1 and isinstance(here[0], LowRank):
        return product_norm(here[0].scale.double() * here[0].up.double(), here[0].down)
    try:
        change, _ = change_of([part.to("cpu", torch.float64) for part in here])
    except NotFoldable:
        return None
    return None if change is None else float(change.norm())
