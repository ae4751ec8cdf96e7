"""Lanes: what an attention gives is a weighted sum of attentions, each over some memories beside the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from adapterhub.errors import UsageError


@dataclass(frozen=True)
class Lane:
    """One term of what an attention gives: `weight` times the attention over these memories beside the tokens.

    memories: (keys, values), each (key-value heads, n, head width); none: the bare attention."""

    weight: float = 1.0
    memories: tuple[tuple[Tensor, Tensor], ...] = ()


BARE = (Lane(),)
"""The attention as the base has it."""


@dataclass(frozen=True)
class Memory:
    """What the rows of a batch attend to besides their tokens, at one attention: the k-th lane of every row together."""

    weights: Tensor
    """(lanes, rows): how much each lane counts; 0 where a row has fewer."""
    keys: Tensor
    """(lanes, rows, key-value heads, n, head width), shorter ones padded with zeros."""
    values: Tensor
    real: Tensor
    """(lanes, rows, n) bool: where a memory stands."""


def remembers(lanes: Iterable[Lane]) -> bool:
    """Whether any of them attends to a memory. Weights cannot say it: (1 - w) + w is not 1 for every float w."""
    return any(lane.memories for lane in lanes)


def weighed(lanes: Sequence[Lane], weight: float) -> list[Lane]:
    return [Lane(lane.weight * weight, lane.memories) for lane in lanes]


def gathered(lanes: Sequence[Lane]) -> tuple[Lane, ...]:
    """Lanes over the same memories as one; those that weigh nothing are left out."""
    if not remembers(lanes):
        return BARE  # the weights of what an attention gives add up to 1
    weights: dict[tuple[int, ...], float] = {}
    memories = {}
    for lane in lanes:
        key = tuple(sorted(id(keys) for keys, _ in lane.memories))
        weights[key] = weights.get(key, 0.0) + lane.weight
        memories[key] = lane.memories
    return tuple(Lane(weight, memories[key]) for key, weight in weights.items() if weight)


def whole(advance: int, weight: float) -> int:
    """How far a part that is weighed moves positions. They are a whole row's, so there is no half of it."""
    if advance and min(abs(weight), abs(weight - 1)) > 1e-12:
        raise UsageError(
            "a prefix that moves its row's positions cannot be scaled or mixed",
            "stack it at full weight: 'a + b'",
        )
    return advance * round(weight)
