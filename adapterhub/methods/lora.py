"""LoRA, rsLoRA and DoRA: a trained low-rank change of linear layers (Hu et al., 2022; Kalajdzievski, "rsLoRA", 2023; Liu
et al., "DoRA", 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft.utils.other import get_pattern_key

from adapterhub.errors import UsageError
from adapterhub.forms.dora import DoRA
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.method import Method
from adapterhub.sites import Site, select


class LoRA(Method):
    """y + s·B(Ax), A random and B zero at the start; s = alpha/r, or alpha/sqrt(r) for rsLoRA. DoRA trains the lengths of
    the changed weight's rows besides, from the base's own. Options as PEFT's."""

    @dataclass(frozen=True)
    class Config:
        r: int = 8
        """Rank."""
        lora_alpha: float = 16
        """Scale of the change, before the division by r (or its root)."""
        target_modules: str | tuple[str, ...] = "all-linear"
        """Roles ("query"), module names ("q_proj") or "all-linear"."""
        use_rslora: bool = False
        use_dora: bool = False
        lora_dropout: float = 0.0
        """Probability that an input of A is dropped while training."""
        rank_pattern: dict[str, int] = field(default_factory=dict)
        """Module name or regular expression of its path -> another r there."""
        alpha_pattern: dict[str, float] = field(default_factory=dict)
        """Likewise for lora_alpha."""
        layers_to_transform: tuple[int, ...] | None = None
        """Only in these layers."""

        def __post_init__(self) -> None:
            for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
                if not math.isfinite(alpha):
                    raise UsageError(f"lora_alpha is {alpha}", "give a number, for example --set lora_alpha=16")

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, LowRank | DoRA]:
        if not 0 <= config.lora_dropout < 1:
            raise UsageError(f"lora_dropout is {config.lora_dropout}", "give a probability from 0 to below 1")
        chosen = select(sites, config.target_modules)
        if config.layers_to_transform is not None:
            chosen = [site for site in chosen if site.layer in config.layers_to_transform]
        if not chosen or not all(site.linear for site in chosen):
            wrong = next((site.path for site in chosen if not site.linear), "no site at all")
            raise UsageError(
                f"LoRA changes linear layers, and target_modules selects {wrong}",
                "use all-linear or names such as q_proj",
            )
        return {site.path: self.fresh(site, config) for site in chosen}

    def fresh(self, site: Site, config: Config) -> LowRank | DoRA:
        rank, scale = rank_and_scale(
            site.path, config.r, config.lora_alpha, config.use_rslora, config.rank_pattern, config.alpha_pattern
        )
        down = torch.empty(rank, site.inputs)
        torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # as PEFT and the paper's code
        form = DoRA if config.use_dora else LowRank
        made = form(down=down, up=torch.zeros(site.outputs, rank), scale=torch.tensor(scale))
        made.dropout = config.lora_dropout
        return made


def rank_and_scale(
    path: str, r: int, alpha: float, rslora: bool, rank_pattern: Mapping[str, int], alpha_pattern: Mapping[str, float]
) -> tuple[int, float]:
    """(rank, s) of one site, patterns matched as PEFT matches them. Raises UsageError for a rank below 1."""
    rank = rank_pattern.get(get_pattern_key(rank_pattern, path), r)
    alpha = alpha_pattern.get(get_pattern_key(alpha_pattern, path), alpha)
    if rank < 1:
        raise UsageError(f"the rank at {path} is {rank}", "give a rank of 1 or more")
    return rank, alpha / math.sqrt(rank) if rslora else alpha / rank
