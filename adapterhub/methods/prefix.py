"""Prefix tuning: trained keys and values that every token attends to besides the others (Li and Liang, "Prefix-Tuning:
Optimizing Continuous Prompts for Generation", 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from adapterhub.errors import UsageError
from adapterhub.forms.prefix import Prefix
from adapterhub.kinds.method import Method
from adapterhub.sites import Site, select


class PrefixTuning(Method):
    """num_virtual_tokens keys and values at each attention, which move no positions. Trained as they are, without the
    paper's network that makes them from a smaller table."""

    starts_at_base: ClassVar[bool] = False  # whatever a prefix holds, it takes its share of the attention

    @dataclass(frozen=True)
    class Config:
        num_virtual_tokens: int = 16
        target_modules: str | tuple[str, ...] = ("attention",)
        """Roles ("decoder.attention") or module names of attentions."""
        cross_attention: bool = False
        """Also the attentions of a decoder to its encoder, where target_modules selects them."""
        init_std: float = 0.02
        """How widely keys and values are spread about zero at the start."""

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, Prefix]:
        if config.num_virtual_tokens < 1 or not 0 < config.init_std < math.inf:
            raise UsageError(
                f"a prefix of {config.num_virtual_tokens} tokens, spread by {config.init_std}, learns nothing",
                "give num_virtual_tokens >= 1 and init_std > 0",
            )
        chosen = select(sites, config.target_modules)
        if wrong := next((site.path for site in chosen if site.role != "attention" or site.heads is None), None):
            raise UsageError(f"a prefix sits at an attention, and {wrong} is none", "use target_modules=attention")
        if not config.cross_attention:
            chosen = [site for site in chosen if site.part != "cross"]
        if not chosen:
            raise UsageError("target_modules selects cross attention only", "allow it: --set cross_attention=true")
        return {site.path: self.fresh(site, config) for site in chosen}

    def fresh(self, site: Site, config: Config) -> Prefix:
        shape = (site.heads.keys, config.num_virtual_tokens, site.heads.width)
        keys, values = (config.init_std * torch.randn(shape) for _ in range(2))
        return Prefix(keys=keys, values=values, shift=torch.tensor(0))
