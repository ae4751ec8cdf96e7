"""What happens at one module of the base: its `forward`, with what the plan of the running call says about it.

The modules of a base get this forward in their own `__dict__`, once, whatever the number of adapters. It knows its module
by being its method, so a deep copy of the base runs adapters of its own, and everything that other software hangs on a
module (hooks that record hidden states, for example) sees what adapters made of it. Outside of a call it only passes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType, MethodType

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers.pytorch_utils import Conv1D

from adapterhub.errors import BatchError, NotFoldable, PluginError
from adapterhub.kinds.modification import Modification
from adapterhub.plugins.boundary import guard
from adapterhub.runtime.forward import Forward, current, plan_at
from adapterhub.sites.weights import compute_dtype, matrix

_BEFORE = "_adapterhub_before"
"""Where a module keeps the forwards that something else had given it: the latest, which may call those before it, last."""
_INSIDE: ContextVar[Mapping[nn.Module, int]] = ContextVar("adapterhub_inside", default=MappingProxyType({}))
"""How many of those are running, by module."""


def place(module: nn.Module) -> None:
    """Let adapters act at this module. Nothing happens the second time."""
    if placed(module):
        return
    if (given := module.__dict__.get("forward")) is not None:
        module.__dict__[_BEFORE] = (*module.__dict__.get(_BEFORE, ()), given)
    module.__dict__["forward"] = MethodType(forward, module)


def placed(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) is forward


def remove(module: nn.Module) -> None:
    """Give the module its own forward back."""
    if not placed(module):
        return
    del module.__dict__["forward"]
    *before, given = module.__dict__.pop(_BEFORE, (None,))
    if given is not None:
        module.__dict__["forward"] = given
    if before:
        module.__dict__[_BEFORE] = tuple(before)


# Pickle keeps a method by its name: so that what comes back is the module's class's own, this one is named like it.
def forward(module: nn.Module, *args, **kwargs):
    """The module's own forward, and what adapters change about it."""
    now = current()
    if _BEFORE in module.__dict__ and _INSIDE.get().get(module):
        return _run(module, args, kwargs)  # called by a forward that was given after this one
    if now is None:
        if (path := plan_at(module)) is not None:
            raise BatchError(
                f"{path} was called outside of the model's own forward pass, where no rows are known",
                "call the model, not a part of it",
            )
        return _run(module, args, kwargs)
    path = now.paths.get(module)
    if path is None:
        return _run(module, args, kwargs)
    modification, taps = now.plan.sites.get(path), now.taps.get(path, {})
    if modification is None and not taps:
        return _run(module, args, kwargs)
    key, x = _given(path, args, kwargs)
    for tap in taps:
        if tap.into:
            now.states[tap] = x
    if modification is None:
        output = _run(module, args, kwargs)
    else:
        output = _changed(module, now, path, modification, key, x, args, kwargs)
    y = output[0] if isinstance(output, tuple) else output
    for tap, site in taps.items():
        if not tap.into:
            now.states[tap] = y if site.columns is None else y[..., site.columns.index()]
    return output


forward.passes_on = True  # for `weights`: the module computes as its class says


def _run(module: nn.Module, args: tuple, kwargs: dict):
    given = module.__dict__.get(_BEFORE)
    if given is None:
        return type(module).forward(module, *args, **kwargs)
    inside = _INSIDE.get()
    depth = inside.get(module, 0)
    if depth == len(given):
        return type(module).forward(module, *args, **kwargs)
    token = _INSIDE.set({**inside, module: depth + 1})
    try:
        return given[-1 - depth](*args, **kwargs)
    finally:
        _INSIDE.reset(token)


def _given(path: str, args: tuple, kwargs: dict) -> tuple[str, Tensor]:
    """What goes into the module: the argument's name ("" for the first of `args`) and the tensor."""
    if args:
        return "", args[0]
    for name in ("hidden_states", "input", "x"):
        if name in kwargs:
            return name, kwargs[name]
    raise BatchError(f"{path} is called without hidden states that are known as such", "leave this site out")


def _changed(
    module: nn.Module,
    now: Forward,
    path: str,
    modification: Modification,
    key: str,
    x: Tensor,
    args,
    kwargs,
):
    """What the module puts out with the modification in force."""
    if path not in now.memories:
        now.ran.add(path)
    flat = _flattened(path, now, x)
    rows = x.unflatten(0, now.shape) if flat else x
    if now.plan.width not in (None, len(rows)):
        raise BatchError(
            f"{path} sees {x.shape[0]} rows where there are {now.plan.width} by the adapters given",
            "give one adapter expression (or None) for each row; beams are not supported",
        )
    modification = modification.to(x.device, x.dtype if x.is_floating_point() else compute_dtype(module))
    if modification.folds and torch.is_grad_enabled():
        y = _through_weight(module, path, modification, x)
        if y is not None:
            _remember(now, path, y)
            return y
    step, scale = now.step(path, modification), getattr(module, "embed_scale", None)
    if modification.changes_input and (change := _asked(path, modification, "delta_in", rows, step)) is not None:
        rows = rows + change.to(rows.dtype)
        _remember(now, path, rows)
        x = rows.flatten(0, 1) if flat else rows
        args, kwargs = (args, {**kwargs, key: x}) if key else ((x, *args[1:]), kwargs)
    output = _run(module, args, kwargs)
    y = output[0] if isinstance(output, tuple) else output
    seen = y if scale is None else y / scale  # Gemma's embedding multiplies what it looks up: ours is the look-up
    seen = seen.unflatten(0, now.shape) if flat else seen
    change = _asked(path, modification, "delta_out", rows, seen, step)
    if change is None:
        if modification.changes_input or path in now.memories:
            _remember(now, path, y)
        return output
    change = change.flatten(0, 1) if flat else change
    y = y + (change if scale is None else change * scale).to(y.dtype)
    _remember(now, path, y)
    return (y, *output[1:]) if isinstance(output, tuple) else y


def _asked(path: str, modification: Modification, hook: str, *given):
    """What a modification answers. What a form in it does wrong is said with the site."""
    try:
        return getattr(modification, hook)(*given)
    except PluginError:
        with guard(modification, hook, path):
            raise


def _flattened(path: str, now: Forward, x: Tensor) -> bool:
    """Whether this layer works on all rows' tokens in one sequence, as OPT's does."""
    if x.ndim != 2 or not x.is_floating_point() or now.shape is None or not any(map(str.isdecimal, path.split("."))):
        return False
    if ".experts." in path and now.plan.width is not None:
        raise BatchError(f"{path} is an expert: it sees tokens of all rows together", "run one expression for all rows")
    return x.shape[0] == now.shape[0] * now.shape[1]


def _remember(now: Forward, path: str, y: Tensor) -> None:
    if not now.plan.checked:
        size = y.detach().abs().amax() if y.numel() else y.new_zeros(())
        now.largest[path] = torch.maximum(size, now.largest.get(path, size).to(size))


def _through_weight(module: nn.Module, path: str, modification: Modification, x: Tensor) -> Tensor | None:
    """What the module puts out with the weight that the modification makes of its own, in the graph: a change that trains
    (dense, sparse) is cheaper so than beside the module. None if that is not the same."""
    own = type(module).forward
    scale = getattr(module, "embed_scale", None)
    looks_up = own is nn.Embedding.forward or (isinstance(module, nn.Embedding) and scale is not None)
    if _BEFORE in module.__dict__ or not (looks_up or own in (nn.Linear.forward, Conv1D.forward)):
        return None
    weight, bias = matrix(module), getattr(module, "bias", None)
    if weight is None:
        return None
    try:
        weight_change, bias_change = _asked(path, modification, "delta_weight", weight, bias)
    except NotFoldable:
        return None
    weight = weight if weight_change is None else weight + weight_change
    bias = bias_change if bias is None else bias if bias_change is None else bias + bias_change
    if not looks_up:
        return linear(x, weight, bias)
    y = embedding(x, weight.mT, module.padding_idx)
    y = y if bias is None else y + bias
    return y if scale is None else (y * scale).to(y.dtype)
