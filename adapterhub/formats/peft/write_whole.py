"""Modules whole, changed, as PEFT's `modules_to_save` and LN tuning store them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from adapterhub.adapters.fit import bind, check_fit
from adapterhub.errors import HubError, UsageError
from adapterhub.formats.peft.base import BaseModel
from adapterhub.formats.peft.lora import PREFIX
from adapterhub.forms.affine import Affine
from adapterhub.forms.composers import Stack
from adapterhub.kinds.modification import Modification, Modifications
from adapterhub.sites import matrix
from adapterhub.spec.manifest import Release


@torch.no_grad()
def wholes(release: Release, parts: Modifications, base: BaseModel, norms: Collection[str]) -> dict[str, Tensor]:
    """The parameters of these modules with the changes in them, in float32, by PEFT's names; of those in `norms` as LN
    tuning has them. Raises UsageError listing the modules that cannot hold them."""
    check_fit(parts, base.sites, str(release))
    model, places = base.load(), {site.path: site for site in base.sites}
    tensors: dict[str, Tensor] = {}
    faults = []
    for path, here in sorted(parts.items()):
        for part in here:
            bind(part, places[path], model)
        try:
            named = _changed(model.get_submodule(path), here)
        except HubError as error:
            faults.append(f"{path}: {error}")
            continue
        middle = "ln_tuning_layers." if path in norms else ""
        tensors |= {f"{PREFIX}{path}.{middle}{name}": tensor for name, tensor in named.items()}
    if faults:
        raise UsageError(
            f"{release} cannot be written for PEFT:\n  " + "\n  ".join(faults),
            f"for another hub: adapterhub export {release} --format bundle OUT",
        )
    return tensors


def _changed(module: nn.Module, here: Sequence[Modification]) -> dict[str, Tensor]:
    changed = copy.deepcopy(module).double()
    weight, bias = matrix(changed), getattr(changed, "bias", None)
    stack = Stack([part.to(dtype=torch.float64) for part in here])
    if weight is None:
        return _norm(changed, here)
    weight_change, bias_change = stack.delta_weight(weight, bias)
    if bias_change is not None and bias is None:
        raise UsageError("the module has no bias to hold the shift", "")
    if weight_change is not None:
        weight += weight_change
    if bias_change is not None:
        bias += bias_change
    return {name: parameter.float().contiguous() for name, parameter in changed.named_parameters()}


def _norm(norm: nn.Module, here: Sequence[Modification]) -> dict[str, Tensor]:
    """A norm with other parameters, if it then puts out what the modifications make of what it puts out now."""
    given = torch.randn(4, len(norm.weight), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = norm(given)
    for part in here:
        if not isinstance(part, Affine) or part.into:
            raise UsageError(f"{getattr(part, 'form', 'a composition')} at a norm is no other gain", "")
        zero = torch.zeros((), dtype=torch.float64)
        gain, shift = (part.tensors.get(key, zero).double() for key in ("gain", "shift"))
        wanted = wanted + gain * wanted + shift
        norm.weight.mul_(1 + gain)
        if (bias := getattr(norm, "bias", None)) is not None:
            bias.mul_(1 + gain).add_(shift)
    if (norm(given) - wanted).abs().max() > 1e-6 * wanted.abs().max():
        raise UsageError("the norm's own parameters do not hold this gain or shift", "")
    return {name: parameter.float() for name, parameter in norm.named_parameters()}
