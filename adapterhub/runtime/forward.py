"""What runs where: the plan of a batch, and one forward pass under it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.errors import BatchError, UnsafeFile
from adapterhub.kinds.lanes import Memory
from adapterhub.kinds.modification import Modification, Step
from adapterhub.runtime.ensemble import Lanes
from adapterhub.sites import Site, Tap


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
    """Every site of it has run once, and what came out can be computed with."""
    placed: object = None
    """The modules of the base (`Attachment.paths`) that let it act."""

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


LARGEST = sqrt(torch.finfo(torch.float32).max)
"""Hidden states above it have squares that leave float32, in which every norm is computed."""


@dataclass
class Forward:
    """One forward pass: what its sites need. A checkpointed layer that runs again during backward gets the same one."""

    root: nn.Module
    """The model, or its encoder when that runs by itself."""
    plan: Plan
    paths: Mapping[nn.Module, str]
    """The modules of this model where something may happen, and their paths."""
    mask: Tensor | None
    encoder_mask: Tensor | None
    """Of an encoder-decoder, for the sites of its encoder."""
    encoder: str
    """The path of the encoder of a model that has a decoder too, with a dot; "" elsewhere."""
    shape: tuple[int, int] | None
    """Rows and tokens, where the model was given tokens."""
    sequences: Sequences
    training: bool
    memories: Mapping[str, Memory]
    begins: bool
    """Nothing is in the cache yet: every site runs (later, a cross-attention takes its keys from the cache)."""
    outer: Forward | None = None
    """The pass that this one runs inside of."""
    taps: Mapping[str, Mapping[Tap, Site]] = field(default_factory=dict)
    """By module: the taps that read it, and the site that each reads."""
    ran: set[str] = field(default_factory=set)
    states: dict[Tap, Tensor] = field(default_factory=dict)
    """What the taps have read so far."""
    largest: dict[str, Tensor] = field(default_factory=dict)
    """The largest hidden state that each module put out, () each; kept in a plan's first pass only."""

    def step(self, path: str, modification: Modification) -> Step:
        """This pass as the modification at a module sees it."""
        keeps = modification.stateful and self.sequences.states is not None
        state = self.sequences.states.setdefault(path, {}) if keeps else {}
        mask = self.encoder_mask if self.encoder and path.startswith(self.encoder) else self.mask
        return Step(mask, state, self.training, tapped=self.tapped)

    def tapped(self, tap: Tap) -> Tensor:
        if tap not in self.states:
            where = f"{tap.role} of layer {tap.layer}" if tap.layer is not None else tap.role
            raise BatchError(
                f"an adapter reads the states at the {where}, and that site has not run before it",
                "give the model input_ids, and run the whole of it",
            )
        return self.states[tap]

    def check_range(self) -> None:
        """Raise UnsafeFile if adapters made hidden states that the model cannot compute with."""
        if not self.largest or next(iter(self.largest.values())).is_meta:
            return
        sizes = torch.stack([size.to("cpu", torch.float64) for size in self.largest.values()])
        wrong = ~(sizes <= LARGEST)  # not a number, too
        if wrong.any():
            path = list(self.largest)[int(wrong.nonzero()[0])]
            raise UnsafeFile(
                f"the adapters make hidden states too large to compute with: {sizes[wrong][0]:.1e} at {path}",
                "give a smaller weight, or train it again",
            )


@dataclass(frozen=True)
class Call:
    """What one base runs in a call: it belongs to the call, not to the model or the thread."""

    attachment: Any
    """The base's (`attachment.Attachment`)."""
    plan: Plan
    training: bool


_CALLS: ContextVar[Mapping[int, Call]] = ContextVar("adapterhub_calls", default=MappingProxyType({}))
"""By the identity of the base, and of its encoder, which may run by itself."""


def call_of(root: nn.Module) -> Call | None:
    """What this call runs on a base, or on the encoder of one."""
    return _CALLS.get().get(id(root))


@contextmanager
def called(call: Call, roots: Iterable[nn.Module]) -> Iterator[None]:
    """Forward passes of these models inside run the call's plan."""
    token, pass_ = _CALLS.set({**_CALLS.get(), **{id(root): call for root in roots}}), _CURRENT.get()
    try:
        yield
    finally:
        _CALLS.reset(token)
        _CURRENT.set(pass_)  # a pass that an error ended has not been left


def plan_at(module: nn.Module) -> str | None:
    """The path of a module where a plan of this call acts."""
    for call in _CALLS.get().values():
        path = call.attachment.paths.get(module)
        if path in call.plan.sites:
            return path
    return None


_CURRENT: ContextVar[Forward | None] = ContextVar("adapterhub_forward", default=None)


def current() -> Forward | None:
    """The forward pass that this call is inside of."""
    return _CURRENT.get()


def enter(forward: Forward | None) -> None:
    _CURRENT.set(forward)


@contextmanager
def within(forward: Forward | None) -> Iterator[None]:
    """Modules that run inside find this forward pass; afterwards the one before again."""
    token = _CURRENT.set(forward)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class Followed:
    """A layer's checkpoint function. The layer's second run, in backward, finds the forward pass of its first one, in
    whatever thread backward runs."""

    def __init__(self, checkpoint: Callable):
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args, **kwargs):
        forward = current()

        def again(*args, **kwargs):
            with within(forward):
                return function(*args, **kwargs)

        return self.checkpoint(again, *args, **kwargs)
