"""The sparse form: a change of some entries of a weight (Ansell et al., "Composable Sparse Fine-Tuning", 2022; Fisher
masks, SHiRA and top-k compressed changes are the same)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterhub.errors import IncompatibleBase
from adapterhub.kinds.modification import Modification, Step, project
from adapterhub.sites import Site


class Sparse(Modification):
    """Δy = ΔW x, where ΔW is zero but for `values` (k,) at `index` (k,): places in the flattened (outputs, inputs), in
    rising order, any integer type. shape (2,): (outputs, inputs)."""

    form = "sparse"
    additive = True
    folds = True
    stores = ("index", "values", "shape")
    constants = frozenset({"index", "shape"})

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        outputs, inputs = self.shape.tolist()
        self.size = (outputs, inputs)

    @classmethod
    def at(cls, index: Tensor, values: Tensor, size: Sequence[int]) -> Sparse:
        """index (k,) integers in any order, each once; stored in as few bytes as the largest place needs."""
        order = index.argsort()
        small = torch.int32 if size[0] * size[1] <= torch.iinfo(torch.int32).max else torch.int64
        return cls(index=index[order].to(small), values=values[order], shape=torch.tensor(tuple(size)))

    def check(self, site: Site) -> None:
        inputs, outputs = site.inputs, site.outputs
        index = self.index.long()
        integers = not (self.index.is_floating_point() or self.shape.is_floating_point())
        whole = integers and self.size == (outputs, inputs) and index.ndim == 1 and self.values.shape == index.shape
        rising = whole and bool((index.diff() > 0).all())
        if not rising or (len(index) and not 0 <= int(index[0]) <= int(index[-1]) < outputs * inputs):
            raise IncompatibleBase(
                f"a sparse change of {self.size[0]} x {self.size[1]} with {self.values.numel()} values does not fit a "
                f"site of {inputs} to {outputs}, or its places do not rise",
                "install the base that the adapter was made for",
            )

    def dense(self) -> Tensor:
        """ΔW (outputs, inputs)."""
        flat = self.values.new_zeros(self.size[0] * self.size[1])
        return flat.index_put((self.index.long(),), self.values).view(self.size)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        tokens = x.numel() // x.shape[-1] if x.is_floating_point() else x.numel()
        if not x.is_floating_point() or tokens * len(self.values) > self.dense_cost:
            return project(x, self.dense())
        index = self.index.long()
        terms = x[..., index % self.size[1]] * self.values
        return torch.zeros_like(y).index_add(-1, index // self.size[1], terms)

    @property
    def dense_cost(self) -> int:
        """Numbers written to make ΔW whole: where the tokens' own terms are fewer, those are summed instead."""
        return self.size[0] * self.size[1]

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        return self.dense(), None

    def scaled(self, weight: float) -> Sparse:
        return Sparse(**self.tensors | {"values": self.values * weight})

    @classmethod
    def join(cls, parts: Sequence[Modification]) -> Sparse:
        index = torch.cat([part.index.long() for part in parts])
        places, back = index.unique(return_inverse=True)
        values = torch.cat([part.values for part in parts])
        return cls.at(places, values.new_zeros(len(places)).index_add(0, back, values), parts[0].size)

    @classmethod
    def random(cls, site: Site) -> Sparse | None:
        if not (site.linear or site.embedding):
            return None
        count = max(1, site.inputs * site.outputs // 8)
        index = torch.randperm(site.inputs * site.outputs)[:count]
        return cls.at(index, torch.randn(count) * 0.5 * site.inputs**-0.5, (site.outputs, site.inputs))
