"""The DoRA form: a low-rank change of a weight whose rows get lengths of their own (Liu et al., "DoRA", 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from adapterhub.errors import IncompatibleBase, NotFoldable
from adapterhub.forms.low_rank import check_rank
from adapterhub.kinds.modification import Modification, Step, project, times
from adapterhub.sites import Site


class DoRA(Modification):
    """W' = m V / |V| row by row, V = W + s·BA, and the change it makes is W' - W, of the *base's* W: so it only reads the
    site's input, and adds to what stands there as low rank does.

    down A (r, inputs), up B (outputs, r), scale s (), magnitude m (outputs,); a fresh one has none until it meets the
    base's weight, whose row lengths it starts from. As in the paper (section 4.3) no gradient goes through |V|."""

    form = "dora"
    additive = True
    stores = ("down", "up", "scale", "magnitude")
    constants = frozenset({"scale"})
    dropout: float = 0.0
    """Probability that an input of A is dropped while training; belongs to the method, so it is not stored."""
    _weight: Tensor | None = None
    _ratio: Tensor | None = None

    def check(self, site: Site) -> None:
        inputs, outputs = site.inputs, site.outputs
        rank = self.down.shape[0]
        magnitude = self.tensors.get("magnitude")
        lengths = (outputs,) if magnitude is None else magnitude.shape
        shapes = (self.down.shape, self.up.shape, lengths, self.scale.shape)
        if shapes != ((rank, inputs), (outputs, rank), (outputs,), ()):
            raise IncompatibleBase(
                f"DoRA tensors of shapes {[tuple(s) for s in shapes]} do not fit a site of {inputs} to {outputs}",
                "install the base that the adapter was made for",
            )
        check_rank(rank, site)

    def bind(self, weight: Tensor | None) -> None:
        self._weight, self._ratio = weight, None
        if weight is not None and "magnitude" not in self.tensors:
            lengths = weight.detach().to(self.up.device, self.up.dtype).norm(dim=1)
            self.tensors["magnitude"] = nn.Parameter(lengths) if self.up.requires_grad else lengths
        if weight is not None and not self.magnitude.requires_grad:
            self._ratio = self._lengths()

    def to(self, device=None, dtype=None) -> Modification:
        moved = super().to(device, dtype)
        if moved is not self and self._ratio is not None:
            moved._ratio = self._ratio.to(device)
        return moved

    def _dtype(self, name: str, wanted: torch.dtype | None) -> torch.dtype:
        own = super()._dtype(name, wanted)  # what a row's length changes by is less than 16 bits tell
        return torch.promote_types(own, self.tensors[name].dtype) if name == "magnitude" else own

    def _base(self) -> Tensor:
        if self._weight is None:
            raise NotFoldable("its change depends on the base's own weight", "give the base")
        return self._weight

    def _lengths(self) -> Tensor:
        """m / |V| (outputs,), in float32 at least; 0 where V is a row of zeros, which has no direction."""
        with torch.no_grad():
            wide = torch.promote_types(self._base().dtype, torch.float32)
            changed = self._base().to(self.up.device, wide) + (self.scale.to(wide) * self.up.to(wide)) @ self.down.to(
                wide
            )
            norm = changed.norm(dim=1)
        return torch.where(norm > 0, self.magnitude.to(wide) / norm.where(norm > 0, 1), 0)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """(m / |V| - 1, m / |V|), each (outputs,), subtracted before they are rounded to the dtype of the factors."""
        ratio = self._lengths() if self._ratio is None else self._ratio
        return (ratio - 1).to(self.up.dtype), ratio.to(self.up.dtype)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        (excess, ratio), dropped = self._factors(), x
        if self.dropout and step.training and x.is_floating_point():
            dropped = dropout(x, self.dropout)
        low = linear(times(self.scale, project(dropped, self.down)), self.up)
        return excess * project(x, self._base().to(self.up)) + ratio * low

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        base, (excess, ratio) = self._base().to(self.up), self._factors()
        return excess[:, None] * base + ratio[:, None] * (times(self.scale, self.up) @ self.down), None

    def scaled(self, weight: float) -> Modification | None:
        return self if weight == 1 else super().scaled(weight)

    @classmethod
    def random(cls, site: Site) -> DoRA | None:
        if not site.linear:
            return None
        down, up = torch.randn(4, site.inputs) * site.inputs**-0.5, torch.randn(site.outputs, 4) * 0.1
        # The rows of the bed's weights are about 0.2·√inputs long (initializer_range).
        magnitude = 0.2 * site.inputs**0.5 * (1 + 0.2 * torch.randn(site.outputs))
        return cls(down=down, up=up, scale=torch.tensor(1.5), magnitude=magnitude)
