"""The prefix form: keys and values that every token attends to besides the others (Li and Liang, 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from adapterhub.errors import IncompatibleBase
from adapterhub.kinds.lanes import Lane
from adapterhub.kinds.modification import Modification
from adapterhub.sites import Site


class Prefix(Modification):
    """keys and values (key-value heads, n, head width) as the attention kernel gets them, after any rotation; shift ()
    int64: how many positions it moves the tokens of its rows up, 0 or (trained as tokens before a text) n."""

    form = "prefix"
    stores = ("keys", "values", "shift")
    constants = frozenset({"shift"})

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        self.advance = int(self.shift)

    def check(self, site: Site) -> None:
        keys, heads = self.keys, site.heads
        if site.role != "attention" or heads is None:
            raise IncompatibleBase("a prefix sits at an attention, and this is none", "use the base it was made for")
        fits = keys.ndim == 3 and (keys.shape[0], keys.shape[2]) == (heads.keys, heads.width)
        moves = not (self.shift.ndim or self.shift.is_floating_point()) and 0 <= self.advance <= keys.shape[1]
        if not fits or keys.shape != self.values.shape or not moves:
            raise IncompatibleBase(
                f"keys {tuple(keys.shape)} and values {tuple(self.values.shape)} that move positions up by {self.advance} "
                f"are no prefix for {heads.keys} heads of {heads.width}",
                "install the base that the adapter was made for",
            )

    def lanes(self) -> tuple[Lane, ...]:
        return (Lane(1.0, ((self.keys, self.values),)),)

    @classmethod
    def random(cls, site: Site) -> Prefix | None:
        if site.role != "attention" or site.heads is None:
            return None
        shape = (site.heads.keys, int(torch.randint(2, 6, ())), site.heads.width)
        return cls(keys=torch.randn(shape), values=torch.randn(shape), shift=torch.tensor(0))
