"""PEFT's `adapter_config.json`, as data: nothing in it is called, imported or passed on.

What has no exact counterpart here is refused by name. Limits: 1 MiB, finite numbers, no key twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from adapterhub.errors import AGAIN, HubError, ManifestError, NotFound, UnsafeFile
from adapterhub.files.bounded import TooMuch, read_json
from adapterhub.formats.peft.types import CACHES, PROMPTS, TUNERS
from adapterhub.formats.peft.types import REFUSED as REFUSED_TYPES

CONFIG = "adapter_config.json"
MAX_CONFIG = 1 << 20
MAX_RANK = 1 << 16

SAFE_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base's weights as they are."""
REFUSED = {
    "layer_replication": "layers that the base does not have",
    "alora_invocation_tokens": "aLoRA, which starts at certain tokens",
    "arrow_config": "Arrow, which routes between adapters",
    "monteclora_config": "MonteCLoRA, whose sampler is in the file beside the factors",
    "use_qalora": "QA-LoRA, which pools its input",
}
MEASURED = (
    "ensure_weight_tying",
    "kasa_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "velora_config",
)
"""Keys with which PEFT's LoRA is more than factors at modules of its own: what it computes is measured (`peft_tuner`)."""
NEUTRAL = {
    "auto_mapping", "inference_mode", "revision", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "init_lora_weights", "fan_in_fan_out",
}  # fmt: skip
"""Keys that say nothing about what a trained LoRA does, or that `_refusals` looks at."""
Texts = str | list[str]
Rank = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]
Biases = Literal["none", "all", "lora_only"]


class Config(msgspec.Struct, frozen=True):
    """What we read of any type's adapter_config.json, with PEFT's defaults."""

    target_modules: Texts | None = None
    exclude_modules: Texts | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Texts | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    peft_type: str = ""
    peft_version: str | None = None
    task_type: str | None = None
    raw: dict[str, Any] = {}
    """All that it says, checked by nobody; `read_config` sets it."""


class LoraConfig(Config, frozen=True):
    """The same of LoRA's."""

    r: Rank = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    lora_dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    bias: Biases | None = "none"
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


def read_config(folder: Path) -> Config:
    """The config of a PEFT folder (a LoraConfig if it is that type). Raises NotFound, UnsafeFile, ManifestError, and
    HubError naming everything in it that has no exact counterpart here. Unknown keys are warned of and ignored."""
    path = folder / CONFIG
    if not path.is_file():
        raise NotFound(f"{folder} holds no {CONFIG}", "give the folder that PEFT's save_pretrained wrote")
    with path.open("rb") as file:
        raw = _parse(file.read(MAX_CONFIG + 1))
    if refusals := _refusals(raw):
        raise HubError(
            f"{folder.name} cannot be represented exactly:\n  " + "\n  ".join(refusals),
            "what loads is in docs/evidence/peft.md",
        )
    cls = LoraConfig if raw["peft_type"] == "LORA" else Config
    raw.pop("raw", None)
    try:
        config = msgspec.convert(raw, cls)
    except msgspec.ValidationError as error:
        raise ManifestError(f"{CONFIG}: {error}", AGAIN) from None
    if cls is LoraConfig:
        if config.target_modules is None and not raw.get("target_parameters"):
            raise ManifestError(f"{CONFIG} names no target_modules", "add those that the adapter was trained with")
        warn_unknown(raw, {*LoraConfig.__struct_fields__, *REFUSED, *MEASURED, *NEUTRAL})
    return msgspec.structs.replace(config, raw=raw)


def warn_unknown(raw: Mapping[str, Any], known: Collection[str]) -> None:
    if unknown := [key for key, value in raw.items() if key not in known and value]:
        warnings.warn(f"{CONFIG}: unknown keys are ignored: {ascii(', '.join(sorted(unknown)))[:200]}", stacklevel=3)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        raw = read_json(data, MAX_CONFIG)
    except TooMuch as error:
        raise UnsafeFile(f"{CONFIG} is refused: {error}", AGAIN) from None
    except ValueError as error:
        raise ManifestError(f"{CONFIG} is not valid: {error}", AGAIN) from None
    if type(raw) is not dict:
        raise ManifestError(f"{CONFIG} is not a table", AGAIN)
    return raw


def _refusals(raw: Mapping[str, Any]) -> list[str]:
    """Everything in a config that would make the adapter another one than its tensors and scale say."""
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in {"LORA", *TUNERS, *CACHES, *PROMPTS}:
        why = REFUSED_TYPES.get(kind, "no type that we know") if isinstance(kind, str) else "no type that we know"
        return [f"peft_type is {_short(kind)}: {why}"]
    if kind != "LORA":
        return []
    found = [f"{key}: {reason}" for key, reason in REFUSED.items() if raw.get(key)]
    start = raw.get("init_lora_weights", True)
    if start is not None and not any(type(start) is type(safe) and start == safe for safe in SAFE_STARTS):
        found.append(
            f"init_lora_weights is {_short(start)}: it may have changed the base's weights, and the adapter belongs to those "
            "(PEFT converts it: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    return found


def _short(value: Any) -> str:
    return ascii(value)[:40]
