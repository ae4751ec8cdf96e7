"""The gate: a composer with tensors of its own, that learns how much each of its children counts at every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterhub.errors import IncompatibleBase, UsageError
from adapterhub.forms.composers import Composite
from adapterhub.kinds.lanes import remembers
from adapterhub.kinds.modification import Modification, Step, project
from adapterhub.kinds.weight_change import Change, Entry
from adapterhub.sites import Site


class Gate(Composite):
    """Σᵢ gᵢ Δᵢ with g = softmax(W x + b), x the site's own input: weight W (children, inputs), bias b (children,).

    A gate between adapters, as in a mixture of experts (Jacobs et al., 1991); every child counts at every token. Its
    tensors are stored as those of a form are, its children are its release's parents of the relation "gate"."""

    form = "gate"
    stores = ("weight", "bias")
    folds = False

    def __init__(self, **tensors: Tensor):
        super().__init__([])
        self.tensors = tensors

    def over(self, children: Sequence[Modification]) -> Gate:
        """The same gate with something to weigh. Raises UsageError for a number of children that is not its own, and
        for a prefix, which is no change of hidden states."""
        if len(children) != len(self.bias):
            raise UsageError(
                f"a gate over {len(self.bias)} adapters was given {len(children)}", "give as many as it was trained on"
            )
        if any(remembers(child.lanes()) for child in children):
            raise UsageError("a gate weighs changes of hidden states, and a prefix is none", "leave the prefix out")
        gate = Gate(**self.tensors)
        gate.parts = list(children)
        return gate

    def check(self, site: Site) -> None:
        children = len(self.bias)
        if self.weight.shape != (children, site.inputs) or self.bias.shape != (children,):
            raise IncompatibleBase(
                f"a gate of shape {tuple(self.weight.shape)} does not fit a site with {site.inputs} inputs",
                "install the base that the adapter was made for",
            )

    def to(self, device=None, dtype=None) -> Modification:
        moved = super().to(device, dtype)
        tensors = {name: t.to(device, dtype) for name, t in self.tensors.items()}
        if all(tensors[name] is t for name, t in self.tensors.items()):
            return moved
        gate = Gate(**tensors)
        gate.parts = moved.parts
        return gate

    def shares(self, x: Tensor) -> Tensor:
        """(..., children), each row adds up to 1."""
        return torch.softmax(project(x, self.weight, self.bias), -1)

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        shares = step.kept["shares"] = self.shares(x)  # of what came in, not of what the children make of it
        own = [part.delta_in(x, step.child(i)) for i, part in enumerate(self.parts)]
        step.kept["seen"] = [x if change is None else x + change for change in own]  # each its own, as in a mix
        return _weighed(shares, own)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        shares = step.kept["shares"] if "shares" in step.kept else self.shares(x)
        seen = step.kept.get("seen", [x] * len(self.parts))
        changes = [part.delta_out(seen[i], y, step.child(i)) for i, part in enumerate(self.parts)]
        return _weighed(shares, changes)

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> Change:
        return Modification.delta_weight(self, weight, bias)  # every token has its own

    def weight_in(self, weight: Tensor) -> Change:
        return self.delta_weight(weight, None)

    def weight_out(self, enter: Entry | None, weight: Tensor, bias: Tensor | None) -> Change:
        return self.delta_weight(weight, bias)


def _weighed(shares: Tensor, changes: Sequence[Tensor | None]) -> Tensor | None:
    total = None
    for share, change in zip(shares.unbind(-1), changes, strict=True):
        if change is not None:
            term = share[..., None] * change
            total = term if total is None else total + term
    return total
