"""(IA)3: keys, values and the feed-forward's inner values, each number times a learned one (Liu et al., "Few-Shot
Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapterhub.errors import UsageError
from adapterhub.forms.affine import Affine
from adapterhub.kinds.method import Method
from adapterhub.sites import Site, select


class IA3(Method):
    """h + g·h, g zero at the start: what the paper writes as l·h with l = 1 + g. Options as PEFT's."""

    @dataclass(frozen=True)
    class Config:
        target_modules: str | tuple[str, ...] = ("key", "value", "ffn_down")
        """Roles or module names; what comes out of them is scaled."""
        feedforward_modules: str | tuple[str, ...] = ("ffn_down",)
        """Those of them where what goes in is scaled instead; empty: none."""

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, Affine]:
        chosen = select(sites, config.target_modules)
        into = {site.path for site in select(chosen, config.feedforward_modules)} if config.feedforward_modules else ()
        for site in chosen:
            if site.path in into and (site.columns or site.embedding):
                raise UsageError(
                    f"the input of {site.path} is not its own to scale", "leave it out of feedforward_modules"
                )
        return {
            site.path: Affine.of(
                gain=torch.zeros(site.inputs if site.path in into else site.outputs), into=site.path in into
            )
            for site in chosen
        }
