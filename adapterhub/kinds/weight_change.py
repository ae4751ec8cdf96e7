"""Changes of a weight and its bias: sums of them, where None is nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

Change = tuple[Tensor | None, Tensor | None]
"""(ΔW, Δb) of a matrix and of its bias; None: nothing."""
Entry = Callable[[Tensor], Change]
"""What is added to a matrix V that reads other hidden states x', so that it reads the site's input x: V x' = (V + ΔV) x + Δb."""
NOTHING: Change = (None, None)


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is nothing."""
    return a if b is None else b if a is None else a + b


def added(a: Change, b: Change) -> Change:
    return plus(a[0], b[0]), plus(a[1], b[1])


def multiplied(change: Change, weight: float) -> Change:
    return tuple(None if tensor is None else tensor * weight for tensor in change)


def summed(changes: Iterable[Change]) -> Change:
    total = NOTHING
    for change in changes:
        total = added(total, change)
    return total


def in_turn(
    changes: Iterable[Callable[[Tensor, Tensor | None], Change]], weight: Tensor, bias: Tensor | None
) -> Change:
    """The sum of changes, each of the weight and bias that those before it left."""
    total = NOTHING
    for change in changes:
        one = change(*added((weight, bias), total))
        total = added(total, one)
    return total


def through(first: Entry, then: Entry | None) -> Entry:
    """What reading states that two changes of the input made means: `then` came to the input before `first` did."""

    def both(weight: Tensor) -> Change:
        change = first(weight)
        return change if then is None else added(change, then(plus(weight, change[0])))

    return both
