"""Full fine-tuning, kept as a change of the weights: what the base is with it added (task vectors: Ilharco et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from adapterhub.errors import UsageError
from adapterhub.forms.affine import Affine
from adapterhub.forms.dense import Dense
from adapterhub.kinds.method import Method, require_plain
from adapterhub.kinds.modification import Modification
from adapterhub.sites import Site, select


class Full(Method):
    """W + ΔW and b + Δb, zero at the start, trained through the sum as fine-tuning trains W and b."""

    float32_base: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        target_modules: str | tuple[str, ...] = "all-linear"
        """Roles ("embedding", "head"), module names or "all-linear"."""
        norms: bool = False
        """Also the norms, as a gain on what they put out (and a shift, where they have a bias)."""

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, Modification]:
        chosen = select(sites, config.target_modules)
        if wrong := next((site.path for site in chosen if not (site.linear or site.embedding)), None):
            raise UsageError(
                f"full changes whole weights, and target_modules selects {wrong}", "use all-linear or module names"
            )
        require_plain(chosen, "full")
        made: dict[str, Modification] = {site.path: self.fresh(site) for site in chosen}
        for site in select(sites, "norm") if config.norms else ():
            shift = torch.zeros(site.outputs) if site.bias else None
            made[site.path] = Affine.of(gain=torch.zeros(site.outputs), shift=shift)
        return made

    def fresh(self, site: Site) -> Dense:
        bias = {"bias": torch.zeros(site.outputs)} if site.bias else {}
        return Dense(weight=torch.zeros(site.outputs, site.inputs), **bias)
