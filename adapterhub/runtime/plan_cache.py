"""The plans of the batches that a model has run lately, within bounds: a plan holds gathered copies of its adapters."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import RLock

from torch import nn

from adapterhub.runtime.forward import Plan

MANY = 64
"""Plans that are kept at most, those without copies of their own among them."""


class PlanCache:
    """Plans by what was asked for. Besides the latest, they hold at most `room` bytes of copies."""

    def __init__(self, room: int):
        self._room, self._lock = room, RLock()
        self._plans: dict[Hashable, tuple[Plan, int]] = {}
        """The latest last, with the bytes that each holds for itself."""

    @classmethod
    def beside(cls, base: nn.Module) -> PlanCache:
        """For a base: plans of other batches than the latest hold no more than a fiftieth of its bytes."""
        return cls(sum(parameter.nbytes for parameter in base.parameters()) // 50)

    def get(self, key: Hashable, make: Callable[[], tuple[Plan, int]]) -> Plan:
        """The plan of a key, made if it is not there: then the plan and its bytes. Threads that ask at once get one plan."""
        with self._lock:
            found = self._plans.pop(key, None)
            if found is None:
                self._make_room()  # before, so that two large ones are never there together
                found = make()
            self._plans[key] = found
            return found[0]

    def clear(self) -> None:
        with self._lock:
            self._plans.clear()

    def _make_room(self) -> None:
        while len(self._plans) >= MANY:
            del self._plans[next(iter(self._plans))]
        held = [(key, size) for key, (_, size) in self._plans.items() if size]
        total = sum(size for _, size in held)
        for key, size in held:
            if total > self._room:
                total -= size
                del self._plans[key]
