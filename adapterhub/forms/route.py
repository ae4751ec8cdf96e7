"""Rows of a batch that run unlike modifications at one site."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterhub.errors import NotFoldable
from adapterhub.forms.composers import Composite, ask
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.modification import Modification, Step
from adapterhub.kinds.weight_change import Change, Entry


class Route(Composite):
    """Each row of the batch its own: parts[i] for row i, None for the bare base."""

    def __init__(self, rows: Sequence[Modification | None]):
        distinct = {id(part): part for part in rows if part is not None}
        super().__init__(list(distinct.values()))
        self.members = [torch.tensor([i for i, part in enumerate(rows) if id(part) == key]) for key in distinct]

    folds = False  # unlike rows have no weight in common

    def weight_in(self, weight: Tensor) -> Change:
        raise NotFoldable("unlike rows have no weight in common", "run it attached")

    def weight_out(self, enter: Entry | None, weight: Tensor, bias: Tensor | None) -> Change:
        return self.weight_in(weight)

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        return self._scatter(x, lambda part, rows, step: ask(part, "delta_in", x[rows], step), step)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        return self._scatter(y, lambda part, rows, step: ask(part, "delta_out", x[rows], y[rows], step), step)

    def _scatter(self, like: Tensor, change, step: Step) -> Tensor | None:
        total = None
        self.members = [rows.to(like.device) for rows in self.members]  # once: nothing to move after the first time
        for i, (part, rows) in enumerate(zip(self.parts, self.members, strict=True)):
            value = change(part, rows, step.child(i, rows))
            if value is not None:
                total = torch.zeros_like(like) if total is None else total
                total = total.index_add(0, rows, value.to(total.dtype))
        return total


def rows(form: type[Modification], parts: Sequence[Modification | None], site: str = "") -> Modification:
    """Return one modification for a batch whose row i gets parts[i] (None: the bare base), all of one form: as the form
    does it, else each distinct one by itself."""
    own = call(form, "rows", parts, site=site)
    return Route(parts) if own is None else own
