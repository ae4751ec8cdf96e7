"""LoReFT: edit the hidden states in a low-rank subspace (Wu et al., "ReFT: Representation Finetuning for Language
Models", 2024). One form, `subspace`, and one method, `loreft`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from adapterhub import Method, Modification, Site, Step
from adapterhub.errors import IncompatibleBase, UsageError
from adapterhub.sites import select


class Subspace(Modification):
    """Δy = Rᵀ(Wy + b - Ry): in the subspace that R's rows span, what stands there is replaced by Wy + b.

    Tensors: basis R (r, outputs), its rows orthonormal; source W (r, outputs); bias b (r,)."""

    form = "subspace"
    stores = ("basis", "source", "bias")
    dropout: float = 0.0
    """Probability that a coordinate of the edit is dropped while training; belongs to the method, so it is not stored."""

    def check(self, site: Site) -> None:
        rank, outputs = self.basis.shape[0], site.outputs
        shapes = (self.basis.shape, self.source.shape, self.bias.shape)
        if shapes != ((rank, outputs), (rank, outputs), (rank,)):
            raise IncompatibleBase(
                f"subspace tensors of shapes {[tuple(s) for s in shapes]} do not fit a site with {outputs} outputs",
                "use the base that the adapter was made for",
            )

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        edit = linear(y, self.source - self.basis, self.bias)
        if self.dropout and step.training:
            edit = dropout(edit, self.dropout)
        return linear(edit, self.basis.mT)

    @classmethod
    def random(cls, site: Site) -> Subspace:
        basis = orthonormal(torch.randn(4, site.outputs))
        source = basis + 0.3 * torch.randn(4, site.outputs) * site.outputs**-0.5
        return cls(basis=basis, source=source, bias=0.1 * torch.randn(4))


class LoReFT(Method):
    """A subspace edit of the residual stream after each layer; it starts at the base (W = R, b = 0)."""

    @dataclass(frozen=True)
    class Config:
        r: int = 4
        """Dimensions of the subspace."""
        target_modules: str | tuple[str, ...] = ("block",)
        """Roles or module names; what they put out is edited."""
        layers_to_transform: tuple[int, ...] | None = None
        """Only in these layers."""
        dropout: float = 0.0
        """Probability that a coordinate of the edit is dropped while training."""

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, Subspace]:
        chosen = select(sites, config.target_modules)
        if config.layers_to_transform is not None:
            chosen = [site for site in chosen if site.layer in config.layers_to_transform]
        if not chosen:
            raise UsageError(f"layers_to_transform {config.layers_to_transform} selects no site", "layers count from 0")
        width = min(site.outputs for site in chosen)
        if not 1 <= config.r <= width or not 0 <= config.dropout < 1:
            raise UsageError(
                f"a subspace needs 1 <= r <= {width} and 0 <= dropout < 1, not r {config.r}, dropout {config.dropout}",
                "for example --set r=4",
            )
        return {site.path: self.fresh(site, config) for site in chosen}

    def fresh(self, site: Site, config: Config) -> Subspace:
        basis = orthonormal(torch.randn(config.r, site.outputs))
        made = Subspace(basis=basis, source=basis.clone(), bias=torch.zeros(config.r))
        made.dropout = config.dropout
        return made

    def after_step(self, modifications: Mapping[str, Modification]) -> None:
        for modification in modifications.values():
            modification.basis.copy_(orthonormal(modification.basis))


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows that span what these rows (r, width) span, by QR with the diagonal of its triangle positive:
    so it is the one continuous choice, and rows that are orthonormal already come back (the QR retraction)."""
    q, triangle = torch.linalg.qr(rows.mT)
    return (q * triangle.diagonal().sign()).mT.contiguous()
