"""TIES: trim, elect a sign, and average what agrees (Yadav et al., "TIES-Merging", 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub.errors import UsageError
from adapterhub.kinds.merger import Merger
from adapterhub.tensors.largest import largest

ROUNDING = 1e-12
"""Sums of votes that differ by less than this part of them are equal: 0.1 + 0.2 - 0.3 is 6e-17 in floats, and no majority."""


class Ties(Merger):
    """Each change keeps its largest entries; place by place the sign with the larger sum wins, and the mean of the
    entries of that sign is what the place gets.

    The paper's λ is the weights: all of them at λ. Unlike weights multiply the trimmed changes before the vote, so a
    negative one merges the opposite change. Where it differs from the paper:

    - Entries are trimmed per weight, as peft and mergekit do, not over the whole adapter as the authors' code does: one
      threshold would leave nothing at sites whose changes are small, and would need every weight at once.
    - One adapter alone is not trimmed: nothing interferes with it, and at weight 1 it must come out as itself.
    - Where the two signs' sums are equal nothing is left; the authors' code gives such a place the sign of the majority of
      places, which ties it to all others."""

    @dataclass(frozen=True)
    class Config:
        density: float = 0.2
        """The share of entries of each change that stays, above 0 to 1; of equal ones the first."""

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], config: Config) -> Tensor:
        if not 0 < config.density <= 1:
            raise UsageError(f"ties needs 0 < density <= 1, not {config.density:g}", "for example --set density=0.2")
        if len(deltas) == 1:
            return weights[0] * deltas[0]
        votes = [
            weight * trimmed(delta, config.density).double() for delta, weight in zip(deltas, weights, strict=True)
        ]
        total, strength = sum(votes), sum(vote.abs() for vote in votes)
        elected = torch.where(total.abs() > ROUNDING * strength, total.sign(), 0.0)
        agreeing = [torch.where(vote.sign() == elected, vote, 0.0) for vote in votes]
        voters = sum((vote != 0).double() for vote in agreeing)
        return (sum(agreeing) / voters.clamp(min=1)).to(deltas[0].dtype)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The largest entries, at least one, and zeros."""
    places = largest(delta, max(1, round(density * delta.numel())))
    flat = delta.reshape(-1)
    return torch.zeros_like(flat).index_copy(0, places, flat[places]).view_as(delta)
