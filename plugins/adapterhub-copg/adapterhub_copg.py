"""Contrastive policy gradient: learning from logged answers and their rewards, each answer judged against the others to
the same prompt (Flet-Berliac et al., "Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a
supervised-friendly fashion", EMNLP 2024). One objective, `copg`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import pstdev
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from adapterhub import Objective, StepContext, TrainingContext, token_losses
from adapterhub.errors import UsageError


def _copg(gap: Tensor, ratio: Tensor, beta: float) -> Tensor:
    return -(gap - beta / 2 * ratio) * ratio  # its gradient holds beta, not beta / 2, and nothing is detached


def _ipo(gap: Tensor, ratio: Tensor, beta: float) -> Tensor:
    return (gap.sign() * ratio - 1 / (2 * beta)).square()


def _dpo(gap: Tensor, ratio: Tensor, beta: float) -> Tensor:
    return -logsigmoid(beta * gap.sign() * ratio)


PAIRS = {"copg": _copg, "ipo": _ipo, "dpo": _dpo}
"""(the reward of one answer less the other's, the same of their log-ratios, beta) -> loss, each (pairs,). The last two know
only which reward is the larger, and equal ones give them no gradient."""


def pair_loss(rewards: Tensor, ratios: Tensor, group: Tensor, beta: float, pair: str = "copg") -> Tensor:
    """() the mean loss of all pairs of answers to one prompt.

    rewards, ratios (log pi - log pi_ref of the whole answer), group (which prompt): each (answers,); at least one pair. Rewards
    with a large common part need float64.
    Of CoPG it is least where pi is proportional to pi_ref exp(reward / beta), whoever wrote the answers."""
    first, second = (group[:, None] == group).triu(1).nonzero(as_tuple=True)
    gap = (rewards[first] - rewards[second]).to(ratios)
    return PAIRS[pair](gap, ratios[first] - ratios[second], beta).mean()


class CoPG(Objective):
    """-mean (ΔR - beta/2 Δl) Δl over all pairs of a row's completions: l = log pi - log pi_ref, summed over the
    completion's tokens. pi_ref is what lies beneath the adapter."""

    kinds = ("scored",)

    @dataclass(frozen=True)
    class Config:
        beta: float = 0.1
        """The price of leaving the reference: the optimum is that of E[R] - beta KL(pi || pi_ref)."""
        standardise: bool = True
        """Divide the rewards by their standard deviation in the data, so that beta means the same everywhere."""
        pair: str = "copg"
        """copg; or to compare with, ipo or dpo, which see of two rewards only which is the larger."""

        def __post_init__(self) -> None:
            if not 0 < self.beta < math.inf:
                raise UsageError(f"copg.beta is {self.beta}", "give a number above 0, for example --set copg.beta=0.1")
            if self.pair not in PAIRS:
                raise UsageError(f"unknown copg.pair {self.pair!r}", f"one of: {', '.join(PAIRS)}")

    def prepare(self, setting: TrainingContext) -> None:
        """Raises UsageError for a row of one completion, where no row prefers one completion to another, and for rewards so far
        apart or so close that float32 cannot hold their differences."""
        super().prepare(setting)
        for row in setting.examples:
            if len(row) < 2:
                raise UsageError(
                    f"line {row[0].line}: one completion makes no pair, and CoPG learns from pairs",
                    "give each row at least two completions with their rewards, or leave the row out",
                )
        rewards = [[example.reward for example in row] for row in setting.examples]
        if all(len(set(row)) == 1 for row in rewards):
            raise UsageError(
                "in every row all completions have the same reward, so there is nothing to prefer",
                "give completions that differ in reward",
            )
        every = [reward for row in rewards for reward in row]
        gap, spread = max(max(row) - min(row) for row in rewards), max(every) - min(every)
        if not 1e-18 < gap <= spread < 1e18:
            raise UsageError(
                f"the rewards differ by {gap:.3g} at most in a row and by {spread:.3g} in all, which cannot be learned from",
                "give them in a sane range, for example from 0 to 1",
            )
        # The mean, which one would subtract too, cancels in every pair.
        self.scale = pstdev(every) if self.config.standardise else 1.0
        # By group and place in it, each less its row's first: a batch has them in float32, which may not tell them apart.
        self.rewards = torch.zeros(max(row[0].group for row in setting.examples) + 1, max(map(len, rewards))).double()
        for row in setting.examples:
            found = [(example.reward - row[0].reward) / self.scale for example in row]
            self.rewards[row[0].group, : len(row)] = torch.tensor(found, dtype=torch.float64)
        self.rewards = self.rewards.to(setting.model.device)
        self.pairs = sum(1 for row in rewards for _ in combinations(row, 2))

    def loss(self, batch: Mapping[str, Tensor], moment: StepContext) -> Tensor:
        model = self.setting.model
        with model.without_new():
            reference = token_losses(model, batch)
        ratios = (reference - token_losses(model, batch)).sum(1)  # token by token: sums of many would cancel
        group = batch["group"]
        rewards = self.rewards[group, (group[:, None] == group).tril(-1).sum(1)]
        return pair_loss(rewards, ratios, group, self.config.beta, self.config.pair)

    def found(self) -> Mapping[str, Any]:
        """How many pairs the data hold, and what their rewards were divided by."""
        return {"pairs": self.pairs, "scale": self.scale}
