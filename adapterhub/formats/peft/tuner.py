"""An adapter of any of PEFT's types that change modules one by one: PEFT puts it on the base, and what differs is lowered.

The config reaches PEFT as plain values of the fields that its class has: names instead of expressions, sizes bounded,
nothing that names a file, a repository, a class or a tokenizer. The tensors are loaded by name, each accounted for.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.bases import resolution
from adapterhub.errors import AGAIN, HubError, IntegrityError, ManifestError
from adapterhub.formats.peft.base import BaseModel
from adapterhub.formats.peft.config import CONFIG, Config, warn_unknown
from adapterhub.formats.peft.lora import PREFIX
from adapterhub.formats.peft.lower import changes, lowered
from adapterhub.formats.peft.targets import anchored, named, patterned, targeted
from adapterhub.formats.peft.types import UNMEASURED
from adapterhub.kinds.modification import Modifications
from adapterhub.sites import Site

DROPPED = {
    "task_type", "peft_type", "peft_version", "base_model_name_or_path", "auto_mapping", "inference_mode", "revision",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "init_lora_weights", "progressbar", "exclude_modules", "layers_to_transform", "layers_pattern", "target_svd_config",
    "peft_config", "tokenizer_name_or_path", "tokenizer_kwargs",
}  # fmt: skip
"""Fields that PEFT does not get: they say how the adapter was made, or have been worked into the others."""

NO_SIZE = ("seed", "_key", "alpha", "step", "tinit", "tfinal", "deltaT")
"""What stands in the names of numbers that PEFT makes nothing of that size of."""


def read_tuner(
    label: str,
    config: Config,
    stored: Mapping[str, Tensor],
    base: BaseModel,
    direct: Collection[str] = (),
) -> Modifications:
    """What the adapter changes, by site path. direct: modules whose LoRA was read already: only what lies under it counts.

    Needs memory for the base in float32 twice. Raises IntegrityError listing every tensor that PEFT would not load, or
    lacks; HubError listing every changed module that no form holds, or when PEFT does not take the adapter;
    ManifestError for a config with odd values; bounded_re.BadExpression."""
    options = _options(config, base, stored)
    if config.peft_type not in UNMEASURED:
        with peft_errors(label), torch.device("meta"):
            bare = built(config.peft_type, options, copy.deepcopy(base.skeleton))
        _account(label, stored, bare)
    model = base.load()
    pristine = copy.deepcopy(model)
    with peft_errors(label):
        wrapped = built(config.peft_type, options, model)
    named_now = _account(label, stored, wrapped)
    with peft_errors(label):
        from peft.utils.save_and_load import set_peft_model_state_dict

        left = set_peft_model_state_dict(wrapped, named_now).unexpected_keys
    if left:
        raise IntegrityError(f"{label} holds tensors that PEFT would ignore:\n  " + "\n  ".join(sorted(left)), AGAIN)
    return _differences(label, config, pristine, wrapped.base_model.model.eval(), base.sites, direct)


def _options(config: Config, base: BaseModel, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of PEFT's class that the file gives, checked."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type])}
    if config.peft_type != "LORA":
        warn_unknown(config.raw, known)
    names = [name for name, _ in base.skeleton.named_modules() if name]
    options = {key: value for key, value in config.raw.items() if key in known - DROPPED and value is not None}
    if config.target_modules is not None:
        options["target_modules"] = sorted(targeted(config, names, base.sites))
    if isinstance(inputs := options.get("feedforward_modules"), str | list):
        options["feedforward_modules"] = sorted(named(inputs, names))
    most = max(1024, *(n for tensor in stored.values() for n in tensor.shape),
               *(n for site in base.sites for n in (site.inputs, site.outputs)))  # fmt: skip
    for key, value in options.items():
        if key.endswith("_pattern") and isinstance(value, dict) and config.peft_type != "ADALORA":
            found = patterned(value, None, names)
            options[key] = {anchored(path): number for path, number in found.items() if number is not None}
        if not is_plain(key, options[key], most):
            raise ManifestError(
                f"{CONFIG}: {key} is {ascii(value)[:40]}, which fits neither the base nor the tensors", AGAIN
            )
    return options


def is_plain(key: str, value: Any, most: int, depth: int = 0) -> bool:
    """Whether an option is a number, a short text, or a list or table of them, and no size in it is beyond `most`."""
    if isinstance(value, list | dict) and depth < 2:
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        return all(is_plain(key, item, most, depth + 1) for item in inside)
    limit = 1 << 63 if any(word in key for word in NO_SIZE) else most
    small = (isinstance(value, int) and abs(value) <= limit) or (isinstance(value, str) and len(value) < 1000)
    return isinstance(value, float) or small


def built(kind: str, options: Mapping[str, Any], model: nn.Module, trains: bool = False) -> nn.Module:
    """PEFT's model of this type around the given one, whose modules it changes. Raises whatever PEFT raises."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    extra = {"progressbar": False} if kind == "FROD" else {}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options, **extra)
    config.inference_mode = not trains
    return get_peft_model(model, config)


def _account(label: str, stored: Mapping[str, Tensor], wrapped: nn.Module) -> dict[str, Tensor]:
    """The file's tensors by today's names. Each must be one that PEFT saves for this config, or one of the base's own."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    with peft_errors(label):
        own = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        whole = wrapped.state_dict()
    result, faults = {}, []
    for name, tensor in stored.items():
        module, _, last = name.rpartition(".")
        if name not in own and name not in whole and f"{module}.base_layer.{last}" in whole:
            name = f"{module}.base_layer.{last}"  # a bias, as older versions of PEFT named it
        here = own.get(name, whole.get(name))
        if here is None:
            faults.append(f"{name}: no tensor of this adapter, nor of this base{_head_hint(name)}")
        elif here.shape != tensor.shape:
            faults.append(f"{name}: {tuple(tensor.shape)}, where {tuple(here.shape)} belongs")
        result[name] = tensor
    faults += [f"{name} is missing" for name in sorted(own.keys() - result.keys())]
    if faults:
        raise IntegrityError(
            f"{len(faults)} faults in {label}:\n  " + "\n  ".join(faults),
            "give the base that it was made for: --base; else " + AGAIN,
        )
    return result


def _head_hint(name: str) -> str:
    module = name.removeprefix(PREFIX).partition(".")[0]
    if module not in ("classifier", "score", "qa_outputs", "pre_classifier"):
        return ""
    return (
        " (a base with that head: load it with transformers' class for the task, save_pretrained, and give that folder)"
    )


def _differences(
    label: str, config: Config, pristine: nn.Module, changed: nn.Module, sites: Sequence[Site], direct: Collection[str]
) -> Modifications:
    from peft.tuners.lora import LoraLayer

    places = {site.path for site in sites}
    parts: Modifications = {}
    faults = []
    unlike = []
    for path, base, peft in changes(pristine, changed):
        if path in direct and isinstance(peft, LoraLayer):
            unlike += changes(base, peft.base_layer, path)
        else:
            unlike.append((path, base, peft))
    for path, base, peft in unlike:
        try:
            with peft_errors(label):
                here = lowered(base, peft, gains=config.peft_type == "IA3")
        except HubError as error:
            faults.append(f"{path}: {error}")
            continue
        if here and path not in places:
            faults.append(f"{path}: a {type(base).__name__} that adapterhub knows no role of")
        if path in direct and config.raw.get("use_dora") and any(part.form != "affine" for part in here):
            faults.append(f"{path}: another weight of the base under DoRA, which reads it")
        if here:
            parts[path] = here
    if faults:
        raise HubError(
            f"{label} cannot be represented exactly:\n  " + "\n  ".join(faults),
            "what loads is in docs/evidence/peft.md",
        )
    return parts


@contextmanager
def peft_errors(
    label: str, hint: str = "see whether PeftModel.from_pretrained loads it on this base"
) -> Iterator[None]:
    """PEFT's warnings off, and whatever it raises told as what it is: the fault of what `label` names. Raises HubError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except HubError:
            raise
        except Exception as error:
            raise HubError(
                f"PEFT does not take {label}: {type(error).__name__}: {ascii(resolution.first_line(error))[:200]}",
                hint,
            ) from None
