"""What runs where: the plan of a batch, and one forward pass under it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from adapterhub.attention import Memory
from adapterhub.ensemble import Lanes
from adapterhub.errors import BatchError
from adapterhub.modification import Modification, Step, Tap


@dataclass(eq=False)
class Plan:
    """What runs at each site, for a batch of `rows` rows (None: any batch, all rows alike)."""

    sites: Mapping[str, Modification] = field(default_factory=dict)
    """By module."""
    rows: int | None = None
    memories: Callable[[], Mapping[str, Memory]] = dict
    """Prefixes, by attention module; gathered anew for each forward pass while they train."""
    attending: frozenset[str] = frozenset()
    """The attention modules among them."""
    advances: tuple[int, ...] = ()
    """How many positions each row's tokens move up; empty: none moves."""
    key: object = field(default_factory=object)
    """What it was made from: plans of one key do the same."""
    lanes: Lanes | None = None
    """Of an ensemble; then the sites see its lanes, not the rows."""
    for_rows: Callable[[int], Plan] | None = None
    """An ensemble for a batch of any size: its plan for that many rows."""
    checked: bool = False
    """Every site of it has run once."""

    @property
    def width(self) -> int | None:
        """How many rows the sites see; None: any number."""
        return self.rows if self.lanes is None else len(self.lanes.rows)

    @property
    def stateful(self) -> bool:
        return any(modification.stateful for modification in self.sites.values())

    @property
    def bidirectional(self) -> bool:
        return any(modification.bidirectional for modification in self.sites.values())

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        """The sites whose hidden states others read."""
        return tuple(dict.fromkeys(tap for modification in self.sites.values() for tap in modification.taps))


@dataclass
class Sequences:
    """The streaming state that belongs to one key-value cache: how many tokens it has seen, under which plan."""

    plan: Plan
    seen: int = 0
    states: dict[str, dict] | None = None
    """By site; None where gradients are on: a layer that a checkpoint runs again must start as it did the first time."""


@dataclass
class Forward:
    """One forward pass: what its hooks need. A checkpointed layer that runs again during backward gets the same one."""

    root: nn.Module
    """The model, or its encoder when that runs by itself."""
    plan: Plan
    mask: Tensor | None
    encoder_mask: Tensor | None
    """Of an encoder-decoder, for the sites of its encoder."""
    sequences: Sequences
    training: bool
    memories: Mapping[str, Memory]
    begins: bool
    """Nothing is in the cache yet: every site runs (later, a cross-attention takes its keys from the cache)."""
    running: dict[str, list[tuple[Modification, Step]]] = field(default_factory=dict)
    """By site: modifications whose input has gone in and whose output has not come out yet."""
    ran: set[str] = field(default_factory=set)
    states: dict[Tap, Tensor] = field(default_factory=dict)
    """What the taps have read so far."""

    def tapped(self, tap: Tap) -> Tensor:
        if tap not in self.states:
            where = f"{tap.role} of layer {tap.layer}" if tap.layer is not None else tap.role
            raise BatchError(
                f"an adapter reads the states at the {where}, and that site has not run before it",
                "give the model input_ids, and run the whole of it",
            )
        return self.states[tap]
