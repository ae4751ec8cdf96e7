"""Mergers: several adapters into one, site by site, on the weight changes that their forms stand for.

A merger sees tensors only, never a form or a method; `adapterhub.transform.merge` does the rest (bases, sites, exactness, recipe).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


class Merger:
    """Combine the changes of one weight. One adapter at weight 1 must come out as itself (a law)."""

    @dataclass(frozen=True)
    class Config:
        """The options; `--set name=value` on the command line."""

    linear: ClassVar[bool] = False
    """The result is the weighted sum: then forms that can be joined (low rank) are joined exactly, without `combine`."""
    symmetric: ClassVar[bool] = True
    """The order of the adapters does not matter (a law)."""
    homogeneous: ClassVar[bool] = True
    """Changes c times as large merge to c times the result (a law)."""

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], config: Config) -> Tensor:
        """deltas: ΔW of each adapter, each (outputs, inputs) float32, or Δb (outputs,); zeros where an adapter has none."""
        raise NotImplementedError
