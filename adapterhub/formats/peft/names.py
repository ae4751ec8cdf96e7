"""Module names of older versions of transformers, as today's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from torch import Tensor

from adapterhub.formats.peft.base import BaseModel
from adapterhub.formats.peft.config import Config
from adapterhub.formats.peft.lora import PREFIX
from adapterhub.formats.peft.targets import anchored, named, patterned, targeted
from adapterhub.sites import current_path


def current(config: Config, stored: Mapping[str, Tensor], base: BaseModel) -> tuple[Config, dict[str, Tensor]]:
    """The config and the tensors by the names that this version of transformers gives the modules. Where the file has older
    ones, so have the config's lists and expressions: they are matched against those, and written out."""
    kind = base.skeleton.config.model_type
    older: dict[str, str] = {}  # today's name -> the file's
    renamed = {}
    for name, tensor in stored.items():
        pieces = name.removeprefix(PREFIX).split(".")
        for end in range(len(pieces), 0, -1):
            path = ".".join(pieces[:end])
            if (now := current_path(kind, path)) != path:
                older[now] = path
                name = ".".join([PREFIX + now, *pieces[end:]])
                break
        renamed[name] = tensor
    if not older:
        return config, renamed
    names = {older.get(name, name): name for name, _ in base.skeleton.named_modules() if name}
    changed: dict[str, Any] = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    if config.target_modules is not None:
        changed["target_modules"] = sorted(names[name] for name in targeted(config, list(names), base.sites))
    for key, value in config.raw.items():
        if key == "feedforward_modules" and isinstance(value, str | list):
            changed[key] = sorted(names[name] for name in named(value, list(names)))
        if key.endswith("_pattern") and isinstance(value, dict):
            found = patterned(value, None, list(names))
            changed[key] = {anchored(names[name]): v for name, v in found.items() if v is not None}
    raw = config.raw | changed
    fields = {key: value for key, value in changed.items() if key in type(config).__struct_fields__}
    return msgspec.structs.replace(config, **fields, raw=raw), renamed
