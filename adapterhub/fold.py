"""Folding: modifications that are changes of weights, added into the weights for good."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapterhub.adapter import Modifications
from adapterhub.composers import Stack
from adapterhub.errors import NotFoldable


@torch.no_grad()
def fold(base: nn.Module, parts: Modifications) -> None:
    """Change the base's weights so that it does without the modifications what it does with them.

    Raises NotFoldable before anything is changed: for a form that is no change of a weight, a shift without a bias to
    hold it, or a weight that another module shares. Computed in float32 (float64 for a float64 weight), rounded once to
    the weight's dtype. Needs memory for a second copy of the weights it changes."""
    owners: dict[int, list[str]] = {}
    for path, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    folded: list[tuple[Tensor, Tensor]] = []
    for path, here in parts.items():
        module = base.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise NotFoldable(f"{path} is not one weight", "run the adapter attached")
        if len(owners[id(module.weight)]) > 1:
            raise NotFoldable(f"{path} shares its weight with another module", "run the adapter attached")
        wide = torch.promote_types(module.weight.dtype, torch.float32)
        weight, bias = module.weight.to(wide), None if module.bias is None else module.bias.to(wide)
        weight_change, bias_change = Stack(here).to(dtype=wide).delta_weight(weight, bias)
        if weight_change is not None:
            folded.append((module.weight, (weight + weight_change).to(module.weight.dtype)))
        if bias_change is not None:
            if bias is None:
                raise NotFoldable(f"{path} has no bias to hold the adapter's shift", "run the adapter attached")
            folded.append((module.bias, (bias + bias_change).to(module.bias.dtype)))
    for parameter, value in folded:
        parameter.copy_(value)
