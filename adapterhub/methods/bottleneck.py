"""Bottleneck adapters (Houlsby et al., 2019; parallel and scaled: He et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapterhub.errors import UsageError
from adapterhub.forms.bottleneck import ACTIVATIONS, Bottleneck
from adapterhub.kinds.method import Method
from adapterhub.sites import Site, select


class BottleneckAdapter(Method):
    """h + s·(B f(A h + a) + b) after attention and feed-forward, B and b zero at the start."""

    @dataclass(frozen=True)
    class Config:
        r: int = 64
        """Width of the bottleneck."""
        target_modules: str | tuple[str, ...] = ("attention", "ffn")
        """Roles or module names."""
        parallel: bool = False
        """Read the site's input instead of its output."""
        activation: str = "relu"
        """relu, gelu, silu or tanh."""
        scale: float = 1.0
        dropout: float = 0.0
        """Probability that a bottleneck value is dropped while training."""

        def __post_init__(self) -> None:
            if not math.isfinite(self.scale):
                raise UsageError(f"scale is {self.scale}", "give a number, for example --set scale=1")

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, Bottleneck]:
        if config.activation not in ACTIVATIONS:
            raise UsageError(f"unknown activation {config.activation!r}", f"one of: {', '.join(ACTIVATIONS)}")
        if config.r < 1 or not 0 <= config.dropout < 1:
            raise UsageError("a bottleneck needs r >= 1 and 0 <= dropout < 1", "for example --set r=64")
        return {site.path: self.fresh(site, config) for site in select(sites, config.target_modules)}

    def fresh(self, site: Site, config: Config) -> Bottleneck:
        width = site.inputs if config.parallel else site.outputs
        made = Bottleneck(
            down=torch.randn(config.r, width) * width**-0.5,
            down_bias=torch.zeros(config.r),
            up=torch.zeros(site.outputs, config.r),
            up_bias=torch.zeros(site.outputs),
            scale=torch.tensor(config.scale),
            **Bottleneck.switches(config.parallel, config.activation),
        )
        made.dropout = config.dropout
        return made
