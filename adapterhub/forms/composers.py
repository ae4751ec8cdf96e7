"""Composers: a composition of modifications is a modification, so anything nests.

A stack is an ordered program. Additive modifications (those that only read the site's input) commute; others do not.

One rule says what a part reads, in every composer: the site's input as it came to the part, with the part's own change
of it. `delta_in` keeps that ("seen") for `delta_out`; `weight_in` and `weight_out` say the same of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapterhub.kinds import lanes as of_lanes
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.lanes import BARE, Lane
from adapterhub.kinds.modification import Modification, Step
from adapterhub.kinds.weight_change import Change, Entry, added, in_turn, multiplied, plus, summed, through
from adapterhub.sites import Columns, Tap


def _any(name: str) -> property:
    """Whether any of the parts says so of itself."""
    return property(lambda self: any(getattr(part, name) for part in self.parts))


class Composite(Modification):
    """A modification made of others; its tensors are theirs."""

    def __init__(self, parts: Sequence[Modification]):
        super().__init__()
        self.parts = list(parts)

    stateful, bidirectional = _any("stateful"), _any("bidirectional")
    changes_input, changes_output = _any("changes_input"), _any("changes_output")

    @property
    def additive(self) -> bool:
        return all(part.additive for part in self.parts)

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


class Weighed(Composite):
    """A composition that counts each change of its parts by a weight: the changes of the input and those of the output
    are taken one after the other, all parts together."""

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> Change:
        into = self.weight_in(weight)
        return added(into, self.weight_out(None, *added((weight, bias), into)))


class Scaled(Weighed):
    """w times the change of one modification."""

    def __init__(self, part: Modification, weight: float):
        super().__init__([part])
        self.weight = weight

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        change = ask(self.parts[0], "delta_in", x, step.child(0))
        step.kept["seen"] = plus(x, change)  # its own change, whole
        return _times(change, self.weight)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        seen = step.kept.get("seen", x)
        return _times(ask(self.parts[0], "delta_out", seen, y, step.child(0)), self.weight)

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> Change:
        # At full weight it is its part, whatever that is: one that changes both ends, too.
        return (
            ask(self.parts[0], "delta_weight", weight, bias) if self.weight == 1 else super().delta_weight(weight, bias)
        )

    def weight_in(self, weight: Tensor) -> Change:
        return multiplied(ask(self.parts[0], "weight_in", weight), self.weight)

    def weight_out(self, enter: Entry | None, weight: Tensor, bias: Tensor | None) -> Change:
        return multiplied(ask(self.parts[0], "weight_out", enter, weight, bias), self.weight)

    @property
    def advance(self) -> int:
        return of_lanes.whole(self.parts[0].advance, self.weight)

    def lanes(self) -> tuple[Lane, ...]:
        return of_lanes.gathered([Lane(1 - self.weight), *of_lanes.weighed(ask(self.parts[0], "lanes"), self.weight)])

    def scaled(self, weight: float) -> Scaled:
        return Scaled(self.parts[0], self.weight * weight)


class Stack(Composite):
    """One after the other: the next sees the site as the ones before left it. The last is outermost: its input change
    comes first, its output change last. Stack([]) is the base."""

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        total, seen = None, {}
        for i in reversed(range(len(self.parts))):
            total = plus(total, ask(self.parts[i], "delta_in", plus(x, total), step.child(i)))
            seen[i] = plus(x, total)  # what the parts inside of it add, it does not see
        step.kept["seen"] = seen
        return total

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        seen, total = step.kept.get("seen", {}), None
        for i, part in enumerate(self.parts):
            change = ask(part, "delta_out", seen.get(i, x), y, step.child(i))
            y, total = plus(y, change), plus(total, change)
        return total

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> Change:
        return in_turn([partial(ask, part, "delta_weight") for part in self.parts], weight, bias)

    def weight_in(self, weight: Tensor) -> Change:
        return in_turn([lambda w, _, part=part: ask(part, "weight_in", w) for part in self.parts], weight, None)

    def weight_out(self, enter: Entry | None, weight: Tensor, bias: Tensor | None) -> Change:
        def change(i: int):
            outer = Stack(self.parts[i + 1 :])  # what has changed the input before it comes to this part
            inner = through(outer.weight_in, enter) if outer.changes_input else enter
            return lambda w, b: ask(self.parts[i], "weight_out", inner, w, b)

        return in_turn(map(change, range(len(self.parts))), weight, bias)

    def lanes(self) -> tuple[Lane, ...]:
        """Memories side by side: each lane of one with each of the others."""
        lanes = BARE
        for part in self.parts:
            lanes = [Lane(a.weight * b.weight, a.memories + b.memories) for a in lanes for b in ask(part, "lanes")]
        return of_lanes.gathered(lanes)


class Mix(Weighed):
    """Side by side: all see the same hidden states, their changes are added (scale the parts for a weighted sum).

    Of parts that change the input this is the first-order sum: there is one y, that of the input with all their changes."""

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        changes = [ask(part, "delta_in", x, step.child(i)) for i, part in enumerate(self.parts)]
        step.kept["seen"] = {i: plus(x, change) for i, change in enumerate(changes)}
        return _sum(changes)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        seen = step.kept.get("seen", {})
        return _sum(ask(part, "delta_out", seen.get(i, x), y, step.child(i)) for i, part in enumerate(self.parts))

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> Change:
        if len(self.parts) == 1:
            return ask(self.parts[0], "delta_weight", weight, bias)
        return super().delta_weight(weight, bias)

    def weight_in(self, weight: Tensor) -> Change:
        return summed(ask(part, "weight_in", weight) for part in self.parts)

    def weight_out(self, enter: Entry | None, weight: Tensor, bias: Tensor | None) -> Change:
        return summed(ask(part, "weight_out", enter, weight, bias) for part in self.parts)

    @property
    def advance(self) -> int:
        return of_lanes.whole(super().advance, 1.0 if len(self.parts) == 1 else 0.5)

    def lanes(self) -> tuple[Lane, ...]:
        return of_lanes.gathered([Lane(1 - len(self.parts)), *(lane for part in self.parts for lane in part.lanes())])


class Inside(Composite):
    """A modification of a column site, as one of the whole fused module: it sees and changes its own outputs only."""

    def __init__(self, part: Modification, columns: Columns):
        super().__init__([part])
        self.place, self.columns = columns, torch.tensor(columns.index())

    def to(self, device=None, dtype=None) -> Modification:
        moved = super().to(device, dtype)
        if device is not None and self.columns.device != torch.device(device):
            moved.columns = self.columns.to(device)
        return moved

    def bind(self, weight: Tensor | None) -> None:
        self.parts[0].bind(None if weight is None else weight[self.columns.to(weight.device)])

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        return ask(self.parts[0], "delta_in", x, step)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        columns = self.columns = self.columns.to(y.device)
        change = ask(self.parts[0], "delta_out", x, y[..., columns], step)
        return None if change is None else torch.zeros_like(y).index_copy(-1, columns, change.to(y.dtype))

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> Change:
        return self._spread(weight, bias, partial(ask, self.parts[0], "delta_weight"))

    def weight_in(self, weight: Tensor) -> Change:
        return ask(self.parts[0], "weight_in", weight)

    def weight_out(self, enter: Entry | None, weight: Tensor, bias: Tensor | None) -> Change:
        return self._spread(weight, bias, lambda w, b: ask(self.parts[0], "weight_out", enter, w, b))

    def _spread(self, weight: Tensor, bias: Tensor | None, change) -> Change:
        columns = self.columns.to(weight.device)
        w, b = change(weight[columns], None if bias is None else bias[columns])
        return (
            None if w is None else torch.zeros_like(weight).index_copy(0, columns, w),
            None if b is None else weight.new_zeros(len(weight)).index_copy(0, columns, b),
        )

    def scaled(self, weight: float) -> Modification:
        return Inside(scaled(self.parts[0], weight), self.place)

    @classmethod
    def join(cls, parts: Sequence[Modification]) -> Modification | None:
        inner = [part.parts[0] for part in parts]
        alike = len({part.place for part in parts}) == len({type(part) for part in inner}) == 1
        joined = type(inner[0]).join(inner) if alike else None
        return None if joined is None else Inside(joined, parts[0].place)


def scaled(part: Modification, weight: float) -> Modification:
    """Return the part with its change multiplied by weight: as its form does it, else by multiplying what it answers."""
    own = call(part, "scaled", weight)
    return Scaled(part, weight) if own is None else own


def ask(part: Modification, hook: str, *given: Any) -> Any:
    """What a part answers; a form's answer, anybody's, is checked, and compositions pass on what was."""
    return getattr(part, hook)(*given) if isinstance(part, Composite) else call(part, hook, *given)


def _a_weight(part: Modification) -> bool:
    """Whether it may be a change of a weight (some find out only when asked)."""
    inner = part.parts if isinstance(part, Composite) else []
    return all(map(_a_weight, inner)) if inner else type(part).delta_weight is not Modification.delta_weight


def _times(a: Tensor | None, weight: float) -> Tensor | None:
    return None if a is None else a * weight


def _sum(changes) -> Tensor | None:
    total = None
    for change in changes:
        total = plus(total, change)
    return total
