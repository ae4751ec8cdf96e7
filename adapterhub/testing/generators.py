"""Global generators of random numbers: a part leaves them alone, so that what it draws depends on nothing that others drew."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import numpy
import torch


def _states() -> dict[str, object]:
    numbers = numpy.random.get_state(legacy=False)["state"]
    return {
        "python": random.getstate(),
        "numpy": (numbers["key"].tobytes(), numbers["pos"]),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


@contextmanager
def untouched(what: str, *but: str) -> Iterator[None]:
    """Assert that what runs inside leaves the global generators (all `but` those named) where they were."""
    before = _states()
    yield
    moved = [name for name, state in _states().items() if name not in but and state != before[name]]
    assert not moved, (
        f"{what} moved the global generator of {' and '.join(moved)}: draw from one of its own, seeded by what it is given"
    )


def watched(what: str, function: Callable | None, *but: str) -> Callable | None:
    """The function, which must leave the generators alone."""
    if function is None:
        return None

    @wraps(function)
    def call(*given: object, **named: object) -> object:
        with untouched(what, *but):
            return function(*given, **named)

    return call
