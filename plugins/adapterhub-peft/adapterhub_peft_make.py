"""PEFT's own layers, each around one module that stands alone, and which options they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from adapterhub.bases import first_line
from adapterhub.errors import UsageError
from adapterhub.formats.peft_config import REFUSED as REFUSED_OPTIONS
from adapterhub.formats.peft_targets import anchored
from adapterhub.formats.peft_tuner import DROPPED, NO_SIZE

TYPES = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
OUTSIDE = {
    "target_modules", "modules_to_save", "target_parameters", "trainable_token_indices", "bias", "ensure_weight_tying",
    *REFUSED_OPTIONS, *DROPPED,
}  # fmt: skip
"""PEFT's options that name modules, files or data, or change more than the layers themselves."""


def plain(weight: Tensor, bias: Tensor | None = None, embedding: bool = False) -> nn.Module:
    """A module of the base as PEFT meets it, whatever it is there: weight (outputs, inputs)."""
    outputs, inputs = weight.shape
    if embedding:
        return nn.Embedding(inputs, outputs, _weight=weight.mT.contiguous())
    made = nn.Linear(inputs, outputs, bias=bias is not None)
    made.weight.data = weight
    if bias is not None:
        made.bias.data = bias.detach().float().cpu().clone()
    return made


def layers(kind: str, options: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """PEFT's layers around these modules, by path. Raises UsageError for what PEFT does not take, and for a start that would
    change the base's weights."""
    root, before = nn.Module(), {path: module.weight.detach().clone() for path, module in modules.items()}
    for path, module in modules.items():
        here, (*outer, last) = root, path.split(".")
        for name in outer:
            here = here._modules.setdefault(name, nn.Module())
        here.add_module(last, module)
    options = {
        key: {anchored(path): number for path, number in value.items()} if key.endswith("_pattern") else value
        for key, value in (options | ({"progressbar": False} if kind == "FROD" else {})).items()
    }
    try:
        get_peft_model(root, TYPES[kind](target_modules=list(modules), **options))
        for path in modules:
            _tried(root.get_submodule(path))
    except Exception as error:  # PEFT's own words for what it does not take
        raise UsageError(
            f"PEFT makes no layers of type {kind} here: {type(error).__name__}: {ascii(first_line(error))[:300]}",
            "give a config and target_modules that suit that type (PEFT's documentation has its options)",
        ) from None
    made = {path: root.get_submodule(path) for path in modules}
    for path, layer in made.items():
        if not hasattr(layer, "base_layer"):
            raise UsageError(f"PEFT has no layer of type {kind} for {path}", "choose other target_modules")
        if not torch.equal(layer.base_layer.weight, before[path]):
            raise UsageError(f"with these options {kind} changes the base's weights", "leave out how it starts")
    return made


def layer_state(layer: nn.Module) -> dict[str, Tensor]:
    """All its tensors but the base's, by PEFT's names: parameters, buffers, and the indices that some types keep in tables."""
    named = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    state = {name: tensor for name, tensor in named.items() if not name.startswith("base_layer.")}
    return state | {name: table["default"] for name, table in tables_of(layer).items()}


def tables_of(layer: nn.Module) -> dict[str, dict[str, Any]]:
    tables = {f"{name}.default": table for name, table in vars(layer).items() if isinstance(table, dict)}
    return {name: table for name, table in tables.items() if isinstance(table.get("default"), Tensor)}


def reached(layer: nn.Module) -> list[str]:
    """The trained tensors that decide what the layer puts out (a layer of TinyLoRA holds those of all others too)."""
    trained = {name: tensor for name, tensor in layer_state(layer).items() if tensor.requires_grad}
    found = torch.autograd.grad(_tried(layer).square().sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, found, strict=True) if gradient is not None]


def _tried(layer: nn.Module) -> Tensor:
    base = getattr(layer, "base_layer", layer)
    return layer(torch.arange(3)[None] if isinstance(base, nn.Embedding) else torch.randn(1, 3, base.weight.shape[-1]))


def check_options(kind: str, options: Mapping[str, Any], most: int) -> None:
    """Raise UsageError unless all are options of the type's layers, and plain values: no size above `most`."""
    known = {field.name for field in fields(TYPES[kind])} - OUTSIDE
    for key, value in options.items():
        if key not in known:
            what = "is not for the layers of one adapter" if key in OUTSIDE else f"is none of {kind}'s"
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(sorted(known))}"
            raise UsageError(f"PEFT's option {ascii(key)[:40]} {what}", hint)
        if not _plain(value, 1 << 63 if any(word in key for word in NO_SIZE) else most):
            raise UsageError(
                f"{key} is {ascii(value)[:40]}, no plain value of sane size", "give a number, word or list"
            )


def _plain(value: Any, most: int, depth: int = 0) -> bool:
    if isinstance(value, list | tuple | dict):
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        return depth < 2 and all(_plain(item, most, depth + 1) for item in inside)
    if isinstance(value, str):
        return len(value) < 1000
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) <= most)
