"""A gate over adapters that are there already: what is trained is how much each counts where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapterhub.forms.gate import Gate
from adapterhub.kinds.method import Method
from adapterhub.sites import Site


class GateMethod(Method):
    """At every site where one of its children acts, a softmax gate over them; equal shares at the start.

    `adapterhub train --method gate --on me/a --on me/b`: the adapters of --on are its children, frozen."""

    starts_at_base = False
    weighs = True

    @dataclass(frozen=True)
    class Config:
        children: int = 2
        """How many it weighs; training sets it to the number of adapters given with --on."""

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, Gate]:
        return {
            site.path: Gate(weight=torch.zeros(config.children, site.inputs), bias=torch.zeros(config.children))
            for site in sites
        }
