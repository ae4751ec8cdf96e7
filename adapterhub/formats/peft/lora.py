"""PEFT's LoRA tensors as low-rank and DoRA modifications, read without PEFT: A and B are kept bit by bit.

The scale is PEFT's: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023), with r and alpha of
each module from `rank_pattern` and `alpha_pattern`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.errors import AGAIN, IncompatibleBase, IntegrityError
from adapterhub.formats.peft.config import CONFIG, LoraConfig
from adapterhub.formats.peft.targets import all_linear, patterned, targeted
from adapterhub.methods.lora import rank_and_scale
from adapterhub.sites import Site

PREFIX = "base_model.model."
KEYS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
}
STORED = re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, KEYS))})")


@dataclass(frozen=True)
class Lora:
    """What was read directly."""

    tensors: dict[str, Tensor]
    """By our names, floating as stored; the scales are float32."""
    paths: frozenset[str]
    """The modules that it is at."""
    rest: dict[str, Tensor]
    """The file's other tensors."""
    options: dict[str, Any]
    """Of the method `lora`, in PEFT's names."""


def read_lora(
    label: str, config: LoraConfig, stored: Mapping[str, Tensor], skeleton: nn.Module, sites: Sequence[Site]
) -> Lora:
    """The LoRA at linear layers and embeddings. Raises IntegrityError or IncompatibleBase listing every tensor that is
    no part of a whole at a targeted site with the rank that the config says; bounded_re.BadExpression."""
    tables = {site.path for site in sites if isinstance(skeleton.get_submodule(site.module), nn.Embedding)}
    names = [site.path for site in sites if not site.columns and (site.linear or site.path in tables)]
    wanted = targeted(config, names, sites)
    ranks = patterned(config.rank_pattern or {}, config.r, names)
    alphas = patterned(config.alpha_pattern or {}, config.lora_alpha, names)
    groups, rest = _groups(stored, tables if config.use_dora else ())
    strays = [f"{path}: the base has no such linear layer" for path in sorted(groups.keys() - set(names))]
    faults = [f"{name}: it belongs to no LoRA" for name in rest if not name.startswith(PREFIX)]
    tensors: dict[str, Tensor] = {}
    for path in [path for path in names if path in groups]:
        if path not in wanted:
            faults.append(f"{path}: its LoRA is not among target_modules, and PEFT would ignore it")
        elif fault := _fault(groups[path], ranks[path], config, path in tables):
            faults.append(f"{path}: {fault}")
        else:
            scale = torch.tensor(rank_and_scale(path, ranks[path], alphas[path], config.use_rslora, {}, {})[1])
            tensors |= _forms(path, groups[path], scale)
    if faults or strays:
        raise (IntegrityError if faults else IncompatibleBase)(
            f"{len(faults) + len(strays)} faults in {label}:\n  " + "\n  ".join([*strays, *faults]),
            AGAIN if faults else "give the base that it was made for: --base",
        )
    if bare := wanted - groups.keys():
        warnings.warn(
            f"{label} has no tensors for {len(bare)} of the modules it targets ({min(bare)}, ...): they stay as in the base",
            stacklevel=2,
        )
    return Lora(tensors, frozenset(groups), rest, _options(config, ranks, alphas, list(groups)))


def _groups(
    stored: Mapping[str, Tensor], left: Collection[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """{module path: {"down": ..., "up": ..., ...}}, and every other tensor, with those of the modules `left`: DoRA of an
    embedding is another formula than the form's."""
    groups: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in stored.items():
        if (hit := STORED.fullmatch(name)) and hit[1] not in left:
            groups.setdefault(hit[1], {})[KEYS[hit[2]]] = tensor
        else:
            rest[name] = tensor
    return groups, rest


def _fault(group: Mapping[str, Tensor], rank: int, config: LoraConfig, embedding: bool) -> str | None:
    """What is wrong with the tensors of one module."""
    needed = {"down", "up"} | ({"magnitude"} if config.use_dora else set()) | ({"bias"} if config.lora_bias else set())
    names = {"down": "lora_A", "up": "lora_B", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
    if lacking := sorted(names[key] for key in needed - group.keys()):
        return f"{', '.join(lacking)} is missing"
    if foreign := sorted(names[key] for key in group.keys() - needed):
        return f"{', '.join(foreign)} is there, but {CONFIG} says nothing of DoRA or a bias"
    if embedding and len(needed) > 2:
        return "DoRA or a bias on the LoRA of an embedding"
    down, up = group["down"], group["up"]
    vectors = [group[key] for key in needed - {"down", "up"}]
    if not all(t.is_floating_point() for t in group.values()) or not down.ndim == up.ndim == 2:
        return f"{down.dtype} {tuple(down.shape)} and {up.dtype} {tuple(up.shape)} are no pair of factors"
    if (found := {down.shape[0], up.shape[1]}) != {rank}:
        return f"rank {' and '.join(map(str, sorted(found)))}, where {CONFIG} says {rank}"
    if any(t.shape != (up.shape[0],) for t in vectors):
        return f"{' and '.join(str(tuple(t.shape)) for t in vectors)}, where {up.shape[0]} numbers belong"
    return None


def _forms(path: str, group: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    """By our names."""
    form = "dora" if "magnitude" in group else "low_rank"
    named = {f"{path}.{form}.0.{key}": t for key, t in group.items() if key != "bias"} | {
        f"{path}.{form}.0.scale": scale
    }
    if "bias" in group:  # B's bias is scaled as B is; the product may not fit in the bias's own dtype
        named[f"{path}.affine.0.shift"] = group["bias"].float() * scale
        named[f"{path}.affine.0.side"] = torch.tensor(0, dtype=torch.uint8)
    return named


def _options(config: LoraConfig, ranks: dict[str, int], alphas: dict[str, float], paths: list[str]) -> dict[str, Any]:
    """The method's options. Expressions are written out: what stays in a manifest are names only."""
    everything = all_linear(config.target_modules)
    targets = "all-linear" if everything else config.target_modules
    layers = config.layers_to_transform
    if config.exclude_modules or config.layers_pattern or not (everything or isinstance(targets, list)):
        targets, layers = sorted(paths), None
    optional = {
        "use_rslora": config.use_rslora,
        "lora_dropout": config.lora_dropout,
        "rank_pattern": {path: ranks[path] for path in sorted(paths) if ranks[path] != config.r},
        "alpha_pattern": {path: alphas[path] for path in sorted(paths) if alphas[path] != config.lora_alpha},
        "layers_to_transform": [layers] if isinstance(layers, int) else layers,
    }
    always = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": targets}
    return always | {key: value for key, value in optional.items() if value}
