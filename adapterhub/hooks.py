"""The hooks at one site: the rows are the rows given, and what the plan says happens there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from adapterhub.attention import Memory
from adapterhub.errors import BatchError, NotFoldable
from adapterhub.modification import Modification, Step
from adapterhub.sites import matrix

if TYPE_CHECKING:
    from adapterhub.attach import Attachment
    from adapterhub.forward import Forward


def remember(attachment: Attachment, path: str) -> None:
    """Let the attention kernel find what the rows of the pass at hand attend to besides their tokens."""

    def find() -> Memory | None:
        forward = attachment.forward
        memory = forward and forward.memories.get(path)
        if memory is not None:
            forward.ran.add(path)
        return memory

    attachment.base.get_submodule(path).__dict__["_adapterhub_memory"] = find


def site_hooks(attachment: Attachment, path: str) -> list:
    module = attachment.base.get_submodule(path)

    def before(module: nn.Module, args: tuple, kwargs: dict):
        own_weight(module)
        forward = attachment.forward
        if forward is not None and (taps := attachment.tapped_at(path)):
            for tap in taps:
                if tap.into:
                    forward.states[tap] = args[0] if args else kwargs["hidden_states"]
        if forward is None and attachment.plan is not None and path in attachment.plan.sites:
            raise BatchError(
                f"{path} was called outside of the model's own forward pass, where no rows are known",
                "call the model, not a part of it",
            )
        modification = forward and forward.plan.sites.get(path)
        if modification is None:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        if forward.plan.width not in (None, x.shape[0]):
            raise BatchError(
                f"{path} sees {x.shape[0]} rows where there are {forward.plan.width} by the adapters given",
                "give one adapter expression (or None) for each row; beams are not supported",
            )
        modification = modification.to(x.device, x.dtype if x.is_floating_point() else module.weight.dtype)
        if modification.folds and torch.is_grad_enabled() and _with_weight(module, modification):
            forward.running.setdefault(path, []).append((_NOTHING, Step()))
            return None
        keeps = modification.stateful and forward.sequences.states is not None
        state = forward.sequences.states.setdefault(path, {}) if keeps else {}
        mask = forward.encoder_mask if attachment.in_encoder(path) else forward.mask
        step = Step(mask, state, forward.training, tapped=forward.tapped)
        forward.running.setdefault(path, []).append((modification, step))
        if not modification.changes_input:
            return None
        change = modification.delta_in(x, step)
        if change is None:
            return None
        x = x + change
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def after(module: nn.Module, args: tuple, kwargs: dict, output):
        changed = changed_by_adapters(module, args, kwargs, output)
        forward = attachment.forward
        if forward is not None and (taps := attachment.tapped_at(path)):
            y = output if changed is None else changed
            y = y[0] if isinstance(y, tuple) else y
            for tap, site in taps.items():
                if not tap.into:
                    forward.states[tap] = y if site.columns is None else y[..., site.columns.index()]
        return changed

    def changed_by_adapters(module: nn.Module, args: tuple, kwargs: dict, output):
        forward = attachment.forward
        if forward is None or path not in forward.plan.sites:
            return None
        own_weight(module)
        modification, step = forward.running[path].pop()
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        scale = getattr(
            module, "embed_scale", None
        )  # Gemma's embedding multiplies what it looks up: ours is the look-up
        change = modification.delta_out(x, y if scale is None else y / scale, step)
        if path not in forward.memories:
            forward.ran.add(path)
        if change is None:
            return None
        y = y + (change if scale is None else change * scale).to(y.dtype)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


_NOTHING = Modification()


def _with_weight(module: nn.Module, modification: Modification) -> bool:
    """Let the module compute with the weight that the modification makes of its own, in the graph, for this one call: a
    change that trains (dense, sparse) is cheaper so than beside it. False if it is no change of a weight after all."""
    weight, bias = matrix(module), getattr(module, "bias", None)
    try:
        weight_change, bias_change = modification.delta_weight(weight, bias)
    except NotFoldable:
        return False
    if weight_change is not None:
        changed = weight + weight_change
        # An instance's own attribute comes before its parameter of that name.
        module.__dict__["weight"] = changed if isinstance(module, nn.Linear) else changed.mT
    if bias_change is not None:
        module.__dict__["bias"] = bias_change if bias is None else bias + bias_change
    return True


def own_weight(module: nn.Module) -> None:
    """Let the module compute with its own weight again."""
    module.__dict__.pop("weight", None)
    module.__dict__.pop("bias", None)


def own_weights(base: nn.Module, forward: Forward | None) -> None:
    """The same for all modules where a forward pass has its sites."""
    for path in forward.plan.sites if forward is not None else ():
        own_weight(base.get_submodule(path))
