"""Run adapters on a base: plans, hooks, attention, one forward pass. Floor 4, runtime."""

from typing import Any


def __getattr__(name: str) -> Any:
    from adapterhub.moved import heir

    return heir(__name__, name)
