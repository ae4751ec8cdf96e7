"""The bottleneck form: h + s·(B f(A h + a) + b) (Houlsby et al., 2019; parallel: He et al., 2022)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, gelu, linear, relu, silu, tanh

from adapterhub.errors import IncompatibleBase
from adapterhub.kinds.modification import Modification, Step, times
from adapterhub.sites import Site

ACTIVATIONS = {"relu": relu, "gelu": gelu, "silu": silu, "tanh": tanh}
"""Stored as its place in this table: append, never reorder."""


class Bottleneck(Modification):
    """down (r, width), down_bias (r,), up (outputs, r), up_bias (outputs,), scale (), and two integers ():
    parallel (1: reads the site's input x; 0, sequential: reads its output y) and activation (place in ACTIVATIONS)."""

    form = "bottleneck"
    stores = ("down", "down_bias", "up", "up_bias", "scale", "parallel", "activation")
    constants = frozenset({"scale", "parallel", "activation"})
    dropout: float = 0.0

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        # Read once: asking a tensor on a GPU in every forward would wait for it.
        self.additive = bool(self.parallel)
        self._activation = list(ACTIVATIONS.values())[int(self.activation)]

    @staticmethod
    def switches(parallel: bool, activation: str) -> dict[str, Tensor]:
        """The two integers as tensors."""
        return {
            "parallel": torch.tensor(int(parallel), dtype=torch.uint8),
            "activation": torch.tensor(list(ACTIVATIONS).index(activation), dtype=torch.uint8),
        }

    @classmethod
    def random(cls, site: Site) -> Bottleneck | None:
        if site.embedding:
            return None
        parallel = bool(torch.rand(()) < 0.5)
        width = site.inputs if parallel else site.outputs
        return cls(
            down=torch.randn(6, width) * width**-0.5,
            down_bias=torch.randn(6) * 0.1,
            up=torch.randn(site.outputs, 6) * 0.1,
            up_bias=torch.randn(site.outputs) * 0.05,
            scale=torch.tensor(0.7),
            **cls.switches(parallel, "gelu"),
        )

    def check(self, site: Site) -> None:
        inputs, outputs = site.inputs, site.outputs
        rank, width = self.down.shape[0], inputs if self.additive else outputs
        shapes = (self.down.shape, self.down_bias.shape, self.up.shape, self.up_bias.shape)
        if shapes != ((rank, width), (rank,), (outputs, rank), (outputs,)) or self.scale.ndim:
            raise IncompatibleBase(
                f"bottleneck tensors of shapes {[tuple(s) for s in shapes]} do not fit a site of {inputs} to {outputs}",
                "install the base that the adapter was made for",
            )

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        hidden = self._activation(linear(x if self.additive else y, self.down, self.down_bias))
        if self.dropout and step.training:
            hidden = dropout(hidden, self.dropout)
        return times(self.scale, linear(hidden, self.up, self.up_bias))
