"""Folding: modifications that are changes of weights, added into the weights for good."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapterhub.adapter import Modifications
from adapterhub.composers import Stack
from adapterhub.errors import NotFoldable
from adapterhub.sites import matrix


@torch.no_grad()
def fold(base: nn.Module, parts: Modifications) -> None:
    """Change the base's weights so that it does without the modifications what it does with them.

    A linear layer without a bias gets one where the change has a shift (LoFiT's offsets): its file then has a tensor that
    plain transformers does not look for, so keep the adapter rather than the folded model. By module (`plan.placed`).
    Raises NotFoldable before anything is changed: for a form that is no change of a weight, or a weight that another
    module shares. Computed in float32 (float64 for a float64 weight), rounded once to
    the weight's dtype. Needs memory for a second copy of the weights it changes."""
    owners: dict[int, list[str]] = {}
    for path, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    folded: list[tuple[Tensor, Tensor]] = []
    added: list[tuple[nn.Module, Tensor]] = []
    for path, here in parts.items():
        module = base.get_submodule(path)
        own = matrix(module)
        if own is None:
            raise NotFoldable(f"{path} is not one weight", "run the adapter attached")
        if len(owners[id(module.weight)]) > 1:
            raise NotFoldable(f"{path} shares its weight with another module", "run the adapter attached")
        wide = torch.promote_types(own.dtype, torch.float32)
        bias = getattr(module, "bias", None)
        weight, bias = own.to(wide), None if bias is None else bias.to(wide)
        weight_change, bias_change = Stack(here).to(dtype=wide).delta_weight(weight, bias)
        if weight_change is not None:
            folded.append((own, (weight + weight_change).to(own.dtype)))
        if bias_change is None:
            continue
        if bias is not None:
            folded.append((module.bias, (bias + bias_change).to(module.bias.dtype)))
        elif isinstance(module, nn.Linear):
            added.append((module, bias_change.to(own.dtype)))
        else:
            raise NotFoldable(f"{path} has no bias to hold the adapter's shift", "run the adapter attached")
    for parameter, value in folded:
        parameter.copy_(value)
    for module, value in added:
        module.bias = nn.Parameter(value, requires_grad=False)
