"""BitFit: the biases alone (Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapterhub.errors import UsageError
from adapterhub.forms.affine import Affine
from adapterhub.kinds.method import Method
from adapterhub.sites import Site, select


class BitFit(Method):
    """y + s, s zero at the start: the change of a bias. A linear layer without a bias gets one, unless `own_biases`: on a
    Llama, which has none of its own, that is all of them."""

    @dataclass(frozen=True)
    class Config:
        target_modules: str | tuple[str, ...] = "all-linear"
        """Roles, module names or "all-linear"."""
        norms: bool = True
        """Also the norms that have a bias."""
        own_biases: bool = False
        """Only where the base has a bias of its own, as in the paper."""

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, Affine]:
        chosen = select(sites, config.target_modules)
        if config.norms:
            chosen += [site for site in sites if site.role == "norm" and site.bias and site not in chosen]
        if config.own_biases:
            chosen = [site for site in chosen if site.bias]
        if not chosen:
            raise UsageError("this base has no biases there", "leave own_biases out: each linear layer gets one")
        return {site.path: Affine.of(shift=torch.zeros(site.outputs)) for site in chosen}
