"""Are two sketches the same model, a rounded or quantised copy of it, or another one?

A mean tolerance cannot tell: ten steps of training move a model less (relative rms 3e-4) than a bfloat16 copy (1.4e-3)
or an int8 copy (7e-3) does. What tells is the kind of difference: rounding is bounded value by value, and quantising
leaves values on a grid, with errors spread evenly over a step. Training does neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapterhub.bases.sketch import unpack
from adapterhub.files.bounded import read_json
from adapterhub.files.safetensors_header import read_layout

UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
"""The unit roundoff: how far, relatively, a value moves at most when it is rounded to the type."""
TINY = 2**-24
"""float16's smallest step near zero."""
HALF = UNIT[torch.float16]
"""Also room for a copy that was rounded on the way (float32 to float16 to bfloat16)."""
GROUPS = (32, 64, 128, 0)
"""Values that share one scale in the usual quantised formats; 0 is a whole row."""
PASS = 0.75
"""Of the rows of a tensor, how many must look quantised."""
NESTED = 0.04
"""How far, relatively, a scale moves at most that is itself kept in 8 bits (QLoRA's double quantisation)."""
Grid = tuple[bool, int, Callable | None]
"""Which side is on it (False: the current one), values that share a scale (0: a whole row), zero point and step (None: the points
need not be evenly spaced)."""


@dataclass(frozen=True)
class Verdict:
    """What the base in use is to the recorded one."""

    kind: Literal["same", "copy", "another"]
    """same weights (perhaps stored in bfloat16) | rounded or quantised copy | another model"""
    distance: float
    """Relative rms of the difference, tensor by tensor, each weighted by its size; infinite if the shapes differ."""
    reason: str


@contextmanager
def one_thread() -> Iterator[None]:
    """Thousands of small operations: waking threads for them costs more than they do, 20 times on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def compare_sketches(recorded: bytes, current: bytes) -> Verdict:
    """What the model sketched as `current` is to the one sketched as `recorded`."""
    equal = recorded == current
    headers = [read_layout(sketch) for sketch in ((recorded,) if equal else (recorded, current))]
    if unknown := {name for header in headers for name, entry in header.items() if 0 in entry.shape}:
        return Verdict(
            "another", math.inf, f"the numbers of its {min(unknown)} are not known, so they cannot be compared"
        )
    if equal:
        return Verdict("same", 0.0, "equal")
    structure, rows = unpack(recorded)
    other_structure, other_rows = unpack(current)
    if structure != other_structure:
        return Verdict("another", math.inf, _first_difference(read_json(structure), read_json(other_structure)))
    shapes = read_json(structure)
    far = {name: _relative(rows[name].double(), other_rows[name].double()) for name in rows}
    values = {name: math.prod(shape) for name, shape in shapes.items()}
    distance = math.sqrt(sum(values[name] * far[name] ** 2 for name in far) / max(1, sum(values.values())))
    kinds, grids = set(), _all_grids()
    for name in sorted(rows):
        kind = _judge(rows[name], other_rows[name], grids)
        if kind is None:
            reason = f"{name} differs by {far[name]:.2g} (relative rms), and not as rounding or quantising does"
            return Verdict("another", distance, reason)
        kinds.add(kind)
    if "quantised" in kinds:
        return Verdict("copy", distance, "one is a quantised copy of the other")
    if "rounded" in kinds:
        return Verdict("copy", distance, "one is a rounded copy of the other")
    return Verdict("same", distance, "equal to the last bit of bfloat16")


def _relative(a: Tensor, b: Tensor) -> float:
    """rms(a - b) / rms(a); 0 where both are zero."""
    size, difference = float(a.norm()), float((a - b).norm())
    return difference / size if size else float(difference > 0)


def _first_difference(recorded: dict, current: dict) -> str:
    for name in sorted(recorded.keys() & current.keys()):
        if recorded[name] != current[name]:
            return f"{name} has the shape {tuple(current[name])}, the recorded base had {tuple(recorded[name])}"
    if missing := sorted(recorded.keys() - current.keys()):
        layer = missing[0].rpartition(".")[0]
        if kept := sorted(name.removeprefix(f"{layer}.") for name in current if name.startswith(f"{layer}.")):
            return f"in place of {missing[0]} it keeps {', '.join(kept)}, whose numbers are not known"
        return f"it has no {missing[0]}, which the recorded base had"
    layer, _, extra = min(current.keys() - recorded.keys()).rpartition(".")
    if f"{layer}.weight" in recorded:
        return f"beside {layer}.weight it keeps {extra}, so its weight may be quantised, and its numbers are not known"
    return f"it has {min(current.keys() - recorded.keys())}, which the recorded base had not"


def _judge(a: Tensor, b: Tensor, grids: list[Grid]) -> str | None:
    """How the rows of one tensor differ: "equal", "rounded" or "quantised"; None if in no such way.

    grids are tried in order; the one that fits comes first the next time."""
    unit_a, unit_b = UNIT[a.dtype], UNIT[b.dtype]
    a, b = a.float(), b.float()
    d = (a - b).abs()
    if bool(((a.bfloat16() == b.bfloat16()) | (d <= TINY)).all()):
        return "equal"
    within = d <= (max(unit_a, unit_b) + HALF) * torch.maximum(a.abs(), b.abs()) + TINY
    if unit_a != unit_b and bool(within.all()):
        return "rounded"
    passed = (a.bfloat16() == b.bfloat16()).all(1) | (within.all(1) if unit_a != unit_b else False)
    for i, (swap, group, grid) in enumerate(grids):
        (q, unit), (f, unit_free) = ((a, unit_a), (b, unit_b)) if swap else ((b, unit_b), (a, unit_a))
        size = group or a.shape[1]
        if a.shape[1] % size or size < 8:
            continue
        q, f = q.reshape(len(q), -1, size), f.reshape(len(f), -1, size)
        passed = passed | (_quantised(q, f, *grid(q), unit, unit_free) if grid else _coded(q, f))
        if passed.float().mean() >= PASS:
            grids.insert(0, grids.pop(i))  # most tensors of a model are alike
            return "quantised"
    return None


# Zero point and step, each (rows, groups, 1), that the usual formats would have used to make q (rows, groups, n).


def _from_least(q: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_1: 16 codes from the least to the largest."""
    low = q.amin(-1, keepdim=True)
    return low, (q.amax(-1, keepdim=True) - low) / 15


def _largest_is(code: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The largest in size has this code: 127 in int8 and Q8_0, 8 in Q4_0, 7 in int4."""

    def grid(q: Tensor) -> tuple[Tensor, Tensor]:
        step = q.abs().amax(-1, keepdim=True) / code
        return torch.zeros_like(step), step

    return grid


def _least_gap(q: Tensor) -> tuple[Tensor, Tensor]:
    """The least gap between two values: for rows whose largest value lies beyond those that a sketch keeps."""
    gaps = q.sort(-1).values.diff(dim=-1)
    step = gaps.masked_fill(gaps <= 1e-5 * q.abs().amax(-1, keepdim=True), math.inf).amin(-1, keepdim=True)
    return torch.zeros_like(step), step


def _all_grids() -> list[Grid]:
    """All that are tried, even ones first."""
    scales = [_from_least, _largest_is(127), _largest_is(8), _largest_is(7)]
    even = [
        (swap, group, grid)
        for swap in (False, True)
        for group in GROUPS
        for grid in (scales if group else [*scales, _least_gap])
    ]
    return even + [(swap, group, None) for swap in (False, True) for group in GROUPS if group]


def _quantised(q: Tensor, f: Tensor, zero: Tensor, step: Tensor, unit: float, unit_free: float) -> Tensor:
    """Which rows (rows,) of q, all (rows, groups, n), are on the grid, with f spread evenly around the grid's points."""
    step = torch.where(step.isfinite() & (step > 0), step, math.inf)
    code = (q - zero) / step
    # What the rounding of q (and of the zero point and the step read off it) can move a code.
    noise = unit * (q.abs() + zero.abs() + 2 * (q - zero).abs()) / step + 1e-3
    telling = (noise < 0.25) & step.isfinite()
    on_grid = ((code - code.round()).abs() <= noise) & telling
    enough = telling.sum((1, 2)) >= 0.1 * q[0].numel()
    fits = on_grid.sum((1, 2)) >= 0.98 * telling.sum((1, 2))
    error = (q - f).abs() / step
    # An end of the grid may have been cut to (Q4_0 has -8 but not +8).
    end = (q == q.amin(-1, keepdim=True)) | (q == q.amax(-1, keepdim=True))
    # Scales are often kept in float16.
    over = error > torch.where(end, 1.02, 0.515) + HALF * code.abs() + (unit * q.abs() + unit_free * f.abs()) / step
    rms = error.square().mean((1, 2)).sqrt()
    return enough & fits & (over.float().mean((1, 2)) <= 0.004) & (rms >= 0.15) & (rms <= 0.4)


def _coded(q: Tensor, f: Tensor) -> Tensor:
    """Which rows (rows,) of q, all (rows, groups, n), hold at most 16 values in each group (NF4, FP4), and f at each place one that is
    nearest to q's, spread evenly between the halfway points."""
    least = 1e-5 * q.abs().amax(-1, keepdim=True)[..., None]
    apart = q[..., None, :] - q[..., :, None]  # (rows, groups, n, n): from each value to the others of its group
    above = apart.masked_fill(apart <= least, math.inf).amin(-1)
    below = (-apart).masked_fill(-apart <= least, math.inf).amin(-1)
    codes = 1 + (q.sort(-1).values.diff(dim=-1) > least[..., 0]).sum(-1)
    above, below = (
        torch.minimum(above, 2 * below),
        torch.minimum(below, 2 * above),
    )  # what lies beyond an end was cut to it
    error, noise = f - q, NESTED * q.abs() + HALF * f.abs()
    over = (error > above / 2 + noise) | (-error > below / 2 + noise)
    rms = (error / ((above + below) / 2)).square().mean((1, 2)).sqrt()
    few = ((codes >= 5) & (codes <= 16)).float().mean(1) >= 0.98
    return few & (over.float().mean((1, 2)) <= 0.004) & (rms >= 0.15) & (rms <= 0.4)
