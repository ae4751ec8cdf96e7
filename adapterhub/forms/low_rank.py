"""The low-rank form: y + s·B(Ax) (Hu et al., "LoRA", 2022)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from adapterhub.errors import IncompatibleBase
from adapterhub.kinds.modification import Modification, Step, project, times
from adapterhub.sites import Site

MOST_RANK, TIMES = 512, 4
"""The largest rank at a site: so much anywhere, else so many times what the weight there can use."""


def check_rank(rank: int, site: Site) -> None:
    """Raise IncompatibleBase for a rank far beyond what a weight of these widths can use: it only takes memory."""
    if rank > max(MOST_RANK, TIMES * min(site.inputs, site.outputs)):
        raise IncompatibleBase(
            f"rank {rank} at a weight of {site.outputs} x {site.inputs}, which can use {min(site.inputs, site.outputs)}",
            "make it smaller without loss where it was made: adapterhub compress --codec svd",
        )


class LowRank(Modification):
    """down (r, inputs), up (outputs, r), scale (). Whatever way it was made: LoRA, rsLoRA, PiSSA, a merge, an SVD."""

    form = "low_rank"
    additive = True
    stores = ("down", "up", "scale")
    constants = frozenset({"scale"})
    dropout: float = 0.0
    """Probability that an input is dropped while training; belongs to the method, so it is not stored."""

    def check(self, site: Site) -> None:
        inputs, outputs = site.inputs, site.outputs
        rank = self.down.shape[0]
        if self.down.shape != (rank, inputs) or self.up.shape != (outputs, rank) or self.scale.ndim:
            raise IncompatibleBase(
                f"low-rank tensors of shapes {tuple(self.up.shape)} and {tuple(self.down.shape)} do not fit a site of {inputs} to {outputs}",
                "install the base that the adapter was made for",
            )
        check_rank(rank, site)
        if rank > min(inputs, outputs):
            warnings.warn(
                f"rank {rank} is more than a weight of {outputs} x {inputs} can use: rank {min(inputs, outputs)} holds the same "
                "without loss (adapterhub compress --codec svd)",
                stacklevel=2,
            )

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        if self.dropout and step.training and x.is_floating_point():
            x = dropout(x, self.dropout)
        return linear(times(self.scale, project(x, self.down)), self.up)

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        return times(self.scale, self.up) @ self.down, None

    def scaled(self, weight: float) -> LowRank:
        return LowRank(down=self.down, up=self.up, scale=self.scale * weight)

    @classmethod
    def random(cls, site: Site) -> LowRank | None:
        if not (site.linear or site.embedding):
            return None
        down, up = torch.randn(4, site.inputs) * site.inputs**-0.5, torch.randn(site.outputs, 4)
        return cls(down=down, up=up * 0.1, scale=torch.tensor(1.5))

    @classmethod
    def join(cls, parts: Sequence[Modification]) -> LowRank:
        down = torch.cat([part.down for part in parts])
        up = torch.cat([times(part.scale, part.up) for part in parts], dim=1)
        return cls(down=down, up=up, scale=torch.ones_like(parts[0].scale))

    @classmethod
    def rows(cls, parts: Sequence[Modification | None]) -> Modification | None:
        """Two batched products over gathered factors, if most rows differ; else the loop over the distinct ones.

        Gathered once per batch, never per layer or step (what that saves: docs/evidence/performance.md)."""
        distinct = {id(part) for part in parts if part is not None}
        return _LowRankRows(parts) if 2 * len(distinct) > len(parts) else super().rows(parts)


class _LowRankRows(Modification):
    """down (rows, r, inputs), up (rows, outputs, r), r the largest rank: shorter ones are padded with zeros."""

    additive = True

    def __init__(self, parts: Sequence[LowRank | None]):
        some = next(part for part in parts if part is not None)
        rank = max(part.down.shape[0] for part in parts if part is not None)
        down = some.down.new_zeros(len(parts), rank, some.down.shape[1])
        up = some.up.new_zeros(len(parts), some.up.shape[0], rank)
        for row, part in enumerate(parts):
            if part is not None:
                down[row, : part.down.shape[0]] = part.down
                up[row, :, : part.up.shape[1]] = times(part.scale, part.up)
        super().__init__(down=down, up=up)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        if not x.is_floating_point():  # token ids: each row picks from its own columns
            rows = torch.arange(len(x), device=x.device).view(-1, *[1] * (x.ndim - 1))
            return self.down.mT[rows, x] @ self.up.mT
        if x.ndim == 2:  # a head on one vector a row
            return ((x[:, None] @ self.down.mT) @ self.up.mT)[:, 0]
        return (x @ self.down.mT) @ self.up.mT
