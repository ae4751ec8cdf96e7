"""Composers: a composition of modifications is a modification, so anything nests.

A stack is an ordered program. Additive modifications (those that only read the site's input) commute; others do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterhub.errors import NotFoldable, UsageError
from adapterhub.modification import BARE, Lane, Modification, Step, Tap
from adapterhub.sites import Columns


class Composite(Modification):
    """A modification made of others; its tensors are theirs."""

    def __init__(self, parts: Sequence[Modification]):
        super().__init__()
        self.parts = list(parts)

    @property
    def additive(self) -> bool:
        return all(part.additive for part in self.parts)

    @property
    def stateful(self) -> bool:
        return any(part.stateful for part in self.parts)

    @property
    def bidirectional(self) -> bool:
        return any(part.bidirectional for part in self.parts)

    @property
    def changes_input(self) -> bool:
        return any(part.changes_input for part in self.parts)

    @property
    def folds(self) -> bool:
        return any(part.folds for part in self.parts) and all(_a_weight(part) for part in self.parts)

    @property
    def taps(self) -> tuple[Tap, ...]:
        return tuple(dict.fromkeys(tap for part in self.parts for tap in part.taps))

    @property
    def advance(self) -> int:
        return sum(part.advance for part in self.parts)

    def bind(self, weight: Tensor | None) -> None:
        for part in self.parts:
            part.bind(weight)

    def to(self, device=None, dtype=None) -> Modification:
        parts = [part.to(device, dtype) for part in self.parts]
        if all(new is old for new, old in zip(parts, self.parts, strict=True)):
            return self
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, parts=parts)
        return copy


class Scaled(Composite):
    """w times the change of one modification."""

    def __init__(self, part: Modification, weight: float):
        super().__init__([part])
        self.weight = weight

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        change = self.parts[0].delta_in(x, step.child(0))
        step.kept["missing"] = _times(change, 1 - self.weight)
        return _times(change, self.weight)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        seen = _plus(x, step.kept.get("missing"))  # its own change of the input, whole
        return _times(self.parts[0].delta_out(seen, y, step.child(0)), self.weight)

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if self.weight not in (0, 1):
            _require_one_end(self.parts)
        w, b = self.parts[0].delta_weight(weight, bias)
        return _times(w, self.weight), _times(b, self.weight)

    @property
    def advance(self) -> int:
        return _whole(self.parts[0].advance, self.weight)

    def lanes(self) -> tuple[Lane, ...]:
        return _gathered([Lane(1 - self.weight), *_weighed(self.parts[0].lanes(), self.weight)])

    def scaled(self, weight: float) -> Scaled:
        return Scaled(self.parts[0], self.weight * weight)


class Stack(Composite):
    """One after the other: the next sees the site as the ones before left it. The last is outermost: its input change
    comes first, its output change last. Stack([]) is the base."""

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        total, after = None, {}
        for i in reversed(range(len(self.parts))):
            total = _plus(total, self.parts[i].delta_in(_plus(x, total), step.child(i)))
            after[i] = total
        # What the parts inside of each one add to the input: the one itself has not seen that.
        step.kept["inner"] = {i: _plus(total, _times(t, -1)) for i, t in after.items() if t is not total}
        return total

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        inner = step.kept.get("inner", {})
        total = None
        for i, part in enumerate(self.parts):
            seen = x - inner[i] if i in inner else x
            change = part.delta_out(seen, y, step.child(i))
            y, total = _plus(y, change), _plus(total, change)
        return total

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        total_weight = total_bias = None
        for part in self.parts:
            w, b = part.delta_weight(weight, bias)
            weight, total_weight = _plus(weight, w), _plus(total_weight, w)
            bias, total_bias = _plus(bias, b), _plus(total_bias, b)
        return total_weight, total_bias

    def lanes(self) -> tuple[Lane, ...]:
        """Memories side by side: each lane of one with each of the others."""
        lanes = BARE
        for part in self.parts:
            lanes = [Lane(a.weight * b.weight, a.memories + b.memories) for a in lanes for b in part.lanes()]
        return _gathered(lanes)


class Mix(Composite):
    """Side by side: all see the same hidden states, their changes are added (scale the parts for a weighted sum).

    Of parts that change the input this is the first-order sum: there is one y, that of the input with all their changes."""

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        changes = [part.delta_in(x, step.child(i)) for i, part in enumerate(self.parts)]
        total = _sum(changes)
        step.kept["others"] = {i: _plus(total, _times(c, -1)) for i, c in enumerate(changes) if c is not total}
        return total

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        others = step.kept.get("others", {})
        return _sum(
            part.delta_out(x - others[i] if i in others else x, y, step.child(i)) for i, part in enumerate(self.parts)
        )

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if len(self.parts) > 1:
            _require_one_end(self.parts)
        into = [part.delta_weight(weight, bias) for part in self.parts if part.changes_input]
        weight, bias = _plus(weight, _sum(w for w, _ in into)), _plus(bias, _sum(b for _, b in into))
        deltas = into + [part.delta_weight(weight, bias) for part in self.parts if not part.changes_input]
        return _sum(w for w, _ in deltas), _sum(b for _, b in deltas)

    @property
    def advance(self) -> int:
        return _whole(super().advance, 1.0 if len(self.parts) == 1 else 0.5)

    def lanes(self) -> tuple[Lane, ...]:
        return _gathered([Lane(1 - len(self.parts)), *(lane for part in self.parts for lane in part.lanes())])


class Inside(Composite):
    """A modification of a column site, as one of the whole fused module: it sees and changes its own outputs only."""

    def __init__(self, part: Modification, columns: Columns):
        super().__init__([part])
        self.columns = torch.tensor(columns.index())

    def to(self, device=None, dtype=None) -> Modification:
        moved = super().to(device, dtype)
        if device is not None and self.columns.device != torch.device(device):
            moved.columns = self.columns.to(device)
        return moved

    def bind(self, weight: Tensor | None) -> None:
        self.parts[0].bind(None if weight is None else weight[self.columns.to(weight.device)])

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        return self.parts[0].delta_in(x, step)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        columns = self.columns = self.columns.to(y.device)
        change = self.parts[0].delta_out(x, y[..., columns], step)
        return None if change is None else torch.zeros_like(y).index_copy(-1, columns, change.to(y.dtype))

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        columns = self.columns.to(weight.device)
        w, b = self.parts[0].delta_weight(weight[columns], None if bias is None else bias[columns])
        return (
            None if w is None else torch.zeros_like(weight).index_copy(0, columns, w),
            None if b is None else weight.new_zeros(len(weight)).index_copy(0, columns, b),
        )


class Route(Composite):
    """Each row of the batch its own: parts[i] for row i, None for the bare base."""

    def __init__(self, rows: Sequence[Modification | None]):
        distinct = {id(part): part for part in rows if part is not None}
        super().__init__(list(distinct.values()))
        self.members = [torch.tensor([i for i, part in enumerate(rows) if id(part) == key]) for key in distinct]

    folds = False  # unlike rows have no weight in common

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        return self._scatter(x, lambda part, rows, step: part.delta_in(x[rows], step), step)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        return self._scatter(y, lambda part, rows, step: part.delta_out(x[rows], y[rows], step), step)

    def _scatter(self, like: Tensor, change, step: Step) -> Tensor | None:
        total = None
        self.members = [rows.to(like.device) for rows in self.members]  # once: nothing to move after the first time
        for i, (part, rows) in enumerate(zip(self.parts, self.members, strict=True)):
            value = change(part, rows, step.child(i, rows))
            if value is not None:
                total = torch.zeros_like(like) if total is None else total
                total = total.index_add(0, rows, value.to(total.dtype))
        return total


def _require_one_end(parts: Sequence[Modification]) -> None:
    """Raise NotFoldable if one of them changes the input and also reads the output that comes of it: weighed, the two
    are no sum of changes of a weight."""
    for part in parts:
        if part.changes_input and any(not leaf.additive and not leaf.changes_input for leaf in _leaves(part)):
            raise NotFoldable(
                "what changes a site's input and reads its output is no change of a weight once scaled or mixed",
                "stack it at full weight: 'a + b', or run it attached",
            )


def _leaves(part: Modification) -> list[Modification]:
    return [leaf for inner in part.parts for leaf in _leaves(inner)] if isinstance(part, Composite) else [part]


def _a_weight(part: Modification) -> bool:
    """Whether it may be a change of a weight (some find out only when asked)."""
    inner = part.parts if isinstance(part, Composite) else []
    return all(map(_a_weight, inner)) if inner else type(part).delta_weight is not Modification.delta_weight


def _weighed(lanes: Sequence[Lane], weight: float) -> list[Lane]:
    return [Lane(lane.weight * weight, lane.memories) for lane in lanes]


def _gathered(lanes: Sequence[Lane]) -> tuple[Lane, ...]:
    """Lanes over the same memories as one; those that weigh nothing are left out."""
    weights: dict[tuple[int, ...], float] = {}
    memories = {}
    for lane in lanes:
        key = tuple(sorted(id(keys) for keys, _ in lane.memories))
        weights[key] = weights.get(key, 0.0) + lane.weight
        memories[key] = lane.memories
    return tuple(Lane(weight, memories[key]) for key, weight in weights.items() if weight)


def _whole(advance: int, weight: float) -> int:
    """How far a part that is weighed moves positions. They are a whole row's, so there is no half of it."""
    if advance and weight not in (0, 1):
        raise UsageError(
            "a prefix that moves its row's positions cannot be scaled or mixed",
            "stack it at full weight: 'a + b'",
        )
    return advance * int(weight)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _times(a: Tensor | None, weight: float) -> Tensor | None:
    return None if a is None else a * weight


def _sum(changes) -> Tensor | None:
    total = None
    for change in changes:
        total = _plus(total, change)
    return total
