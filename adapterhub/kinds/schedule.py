"""A parameter schedule says which of an adapter's tensors train when, and how fast; with any method."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from adapterhub.kinds.method import BuildContext, Parts
from adapterhub.sites import Site


class ParameterSchedule:
    """One object for one training (of each stage). The default trains everything at the run's rate."""

    @dataclass(frozen=True)
    class Config:
        """The options; `--set <schedule>.name=value` on the command line."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Options that the laws are tried with, where the defaults will not do."""

    def __init__(self, config: Config):
        self.config = config

    @property
    def rounds(self) -> int:
        """Into how many parts, of equal length, the steps of a stage are cut."""
        return 1

    def start(self, parts: Parts, given: BuildContext) -> Parts:
        """What a stage built, or what shall train instead; before the first step of a new adapter, never of one that goes on.
        Random numbers from torch's global generator (seeded)."""
        return parts

    def rates(self, tensors: Mapping[str, Site], round: int, draw: random.Random) -> Mapping[str, float]:
        """{name of a tensor: its learning rate as a multiple of the run's} in one round, of all of them; 0: it is frozen
        and costs no gradient. tensors: the names of all that can train, "<site path>.<form>.<n>.<tensor>", and their
        sites, in the model's order; draw: seeded by the run's seed and the round."""
        return dict.fromkeys(tensors, 1.0)
