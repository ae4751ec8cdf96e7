"""Folding: modifications that are changes of weights, added into the weights for good."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapterhub.errors import NotFoldable, UnsafeFile
from adapterhub.forms.composers import Stack
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.modification import Modifications
from adapterhub.runtime.forward import LARGEST
from adapterhub.sites.weights import compute_device, computes, matrix, stored, unlike, widths


@torch.no_grad()
def fold(base: nn.Module, parts: Modifications) -> None:
    """Change the base's weights so that it does without the modifications what it does with them.

    A linear layer without a bias gets one where the change has a shift (LoFiT's offsets): its file then has a tensor that
    plain transformers does not look for, so keep the adapter rather than the folded model. By module (`plan.placed`).
    Raises NotFoldable before anything is changed: for a form that is no change of a weight, a weight that another module
    shares, one that is not plain or not in memory, or a module that does more with it than multiply. Computed in float32 (float64 for a float64 weight), rounded once to
    the weight's dtype. Needs memory for a second copy of the weights it changes."""
    owners: dict[int, list[str]] = {}
    for named in (base.named_parameters, base.named_buffers):
        for path, tensor in named(remove_duplicate=False):
            owners.setdefault(id(tensor), []).append(path)
    folded: list[tuple[Tensor, Tensor]] = []
    added: list[tuple[nn.Module, Tensor]] = []
    for path, here in parts.items():
        module = base.get_submodule(path)
        if problem := _problem(base, path, module):
            raise NotFoldable(problem, "run the adapter attached")
        if len(owners[id(stored(module))]) > 1:
            raise NotFoldable(f"{path} shares its weight with another module", "run the adapter attached")
        own = matrix(module)
        wide = torch.promote_types(own.dtype, torch.float32)
        bias = getattr(module, "bias", None)
        weight, bias = own.to(wide), None if bias is None else bias.to(wide)
        weight_change, bias_change = call(Stack(here).to(dtype=wide), "delta_weight", weight, bias, site=path)
        if weight_change is not None:
            folded.append((own, _within_range(path, (weight + weight_change).to(own.dtype))))
        if bias_change is None:
            continue
        if bias is not None:
            folded.append((module.bias, _within_range(path, (bias + bias_change).to(module.bias.dtype))))
        elif isinstance(module, nn.Linear):
            added.append((module, _within_range(path, bias_change.to(own.dtype))))
        else:
            raise NotFoldable(f"{path} has no bias to hold the adapter's shift", "run the adapter attached")
    for parameter, value in folded:
        parameter.copy_(value)
    for module, value in added:
        module.bias = nn.Parameter(value, requires_grad=False)


def _within_range(path: str, value: Tensor) -> Tensor:
    """The value, unless a model cannot compute with it: then UnsafeFile."""
    if not value.is_meta and not bool((value.abs() <= LARGEST).all()):
        raise UnsafeFile(f"the weight folded into {path} is too large to compute with", "give a smaller weight")
    return value


def _problem(base: nn.Module, path: str, module: nn.Module) -> str:
    """Why nothing can be added into the module's weight; "" if it can."""
    if widths(module) is None:
        return f"{path} is not one weight"
    if how := unlike(module):
        return f"nothing can be folded into {path}: {how}"
    if stored(module).is_meta and compute_device(base) is not None:  # a skeleton, all meta, only rehearses
        return f"nothing can be folded into {path}: its weight is offloaded (on the meta device)"
    kind = type(module).__name__
    return (
        ""
        if computes(module)
        else f"nothing can be folded into {path}: this {kind} does more with its weight than multiply"
    )
