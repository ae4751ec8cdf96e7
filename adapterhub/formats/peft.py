"""PEFT's LoRA tensors as low-rank modifications, read without PEFT and without trust. Every tensor is accounted for.

The scale is PEFT's: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023), with r and alpha of
each module from `rank_pattern` and `alpha_pattern`, matched as `peft.utils.other.get_pattern_key` matches them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterhub import plugins
from adapterhub.errors import IncompatibleBase, IntegrityError, ManifestError, NotFound, UnsafeFile
from adapterhub.formats import bounded_re
from adapterhub.formats.peft_config import AGAIN, CONFIG, Config
from adapterhub.manifest import Made
from adapterhub.methods.lora import rank_and_scale
from adapterhub.sites import Site, select
from adapterhub.tensors import load

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

LEFTOVERS = {
    "lora_embedding_A": "LoRA of an embedding",
    "lora_embedding_B": "LoRA of an embedding",
    "lora_magnitude_vector": "DoRA",
    "lora_A.bias": "a bias on A",
    "lora_B.bias": "a bias on B",
    "base_layer.": "a weight of the base itself; save without it: save_embedding_layers=False",
    "modules_to_save": "a whole module",
    "token_adapter": "trained rows of the embedding",
}


@dataclass(frozen=True)
class PeftAdapter:
    tensors: dict[str, Tensor]
    """By our names, floating as stored; the scales are float32."""
    method: Made
    """`lora` with the options in PEFT's names."""


def read(folder: Path, config: Config, sites: Sequence[Site]) -> PeftAdapter:
    """The adapter in a folder, for a base with these sites.

    Raises UnsafeFile (pickle, NaN), IntegrityError or IncompatibleBase listing every tensor that is not half of a whole
    pair at a targeted site with the rank that the config says, ManifestError for an expression that takes too long."""
    if not (folder / TENSORS).is_file():
        if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")):
            raise UnsafeFile(
                f"{folder.name} holds its weights as a pickle ({pickles[0]}), which can run code when opened",
                "get a copy with safetensors, or convert it where it can do no harm: PEFT's save_pretrained writes safetensors",
            )
        raise NotFound(f"{folder} holds no {TENSORS}", AGAIN)
    stored = load(folder / TENSORS)
    linear = [site.path for site in sites if site.linear]
    try:
        targeted = _targeted(config, sites)
        ranks = _patterned(config.rank_pattern or {}, config.r, linear)
        alphas = _patterned(config.alpha_pattern or {}, config.lora_alpha, linear)
    except bounded_re.BadExpression as error:
        raise ManifestError(f"{CONFIG} has a pattern that cannot be used: {error}"[:200], AGAIN) from None

    pairs, faults = _pairs(stored)
    strays = [f"{path}: the base has no such linear layer" for path in sorted(pairs.keys() - set(linear))]
    tensors: dict[str, Tensor] = {}
    for path in [path for path in linear if path in pairs]:
        down, up = pairs[path].get("A"), pairs[path].get("B")
        if path not in targeted:
            faults.append(f"{path}: its LoRA is not among target_modules, and PEFT would ignore it")
        elif down is None or up is None:
            faults.append(f"{path}: lora_{'A' if down is None else 'B'} is missing")
        elif not (down.is_floating_point() and up.is_floating_point() and down.ndim == up.ndim == 2):
            faults.append(
                f"{path}: {down.dtype} {tuple(down.shape)} and {up.dtype} {tuple(up.shape)} are no pair of factors"
            )
        elif (found := {down.shape[0], up.shape[1]}) != {ranks[path]}:
            faults.append(f"{path}: rank {' and '.join(map(str, found))}, where {CONFIG} says {ranks[path]}")
        else:
            scale = rank_and_scale(path, ranks[path], alphas[path], config.use_rslora, {}, {})[1]
            named = {"down": down, "up": up, "scale": torch.tensor(scale)}
            tensors.update({f"{path}.low_rank.0.{key}": tensor for key, tensor in named.items()})
    if faults or strays:
        raise (IntegrityError if faults else IncompatibleBase)(
            f"{len(faults) + len(strays)} faults in {folder.name}:\n  " + "\n  ".join([*strays, *faults]),
            AGAIN if faults else "give the base that it was made for: --base",
        )
    if not tensors:
        raise IntegrityError(f"{folder.name} holds no LoRA tensors", AGAIN)
    if bare := targeted - pairs.keys():
        warnings.warn(
            f"{folder.name} has no tensors for {len(bare)} of the modules it targets ({min(bare)}, ...): they stay as in the base",
            stacklevel=2,
        )
    return PeftAdapter(tensors, Made(name="lora", options=_options(config, ranks, alphas, list(pairs)),
                                     distribution=plugins.distribution("methods", "lora")))  # fmt: skip


def _targeted(config: Config, sites: Sequence[Site]) -> set[str]:
    """The linear layers that PEFT would put this LoRA on (`peft.tuners.tuners_utils.check_target_module_exists`)."""
    linear = [site.path for site in sites if site.linear]
    if _all_linear(config):
        chosen = {site.path for site in select(sites, "all-linear")}
    else:
        chosen = _named(config.target_modules, linear)
    if config.exclude_modules:
        chosen -= _named(config.exclude_modules, linear)
    layers = config.layers_to_transform
    if layers is None or layers == [] or isinstance(config.target_modules, str):
        return chosen
    wanted = {layers} if isinstance(layers, int) else set(layers)
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # Without a pattern the first numbered part counts. PEFT's own expressions, its first pattern that matches.
    expressions = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns or []] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    layer: dict[str, str] = {}
    for found in reversed(bounded_re.match(expressions, linear)):
        layer |= found
    return {path for path in chosen if layer.get(path, "") != "" and int(layer[path]) in wanted}


def _all_linear(config: Config) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _named(targets: str | list[str], paths: list[str]) -> set[str]:
    """A text is an expression for whole paths; of a list each is a path or the end of one."""
    if isinstance(targets, str):
        return set(bounded_re.match([targets], paths, whole=True)[0])
    ends = tuple(f".{target}" for target in targets)
    return {path for path in paths if path in targets or path.endswith(ends)}


def _patterned(patterns: Mapping[str, Any], default: Any, paths: list[str]) -> dict[str, Any]:
    """{path: value}: that of the first pattern that matches, as `peft.utils.other.get_pattern_key` does it."""
    found = bounded_re.match([rf"(.*\.)?({key})$" for key in patterns], paths)
    values = dict.fromkeys(paths, default)
    for hits, value in reversed(list(zip(found, patterns.values(), strict=True))):
        values.update(dict.fromkeys(hits, value))
    return values


def _pairs(stored: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """{module path: {"A": ..., "B": ...}}, and what every other tensor is."""
    pairs: dict[str, dict[str, Tensor]] = {}
    faults = []
    for name, tensor in stored.items():
        if hit := re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name):
            pairs.setdefault(hit[1], {})[hit[2]] = tensor
        else:
            reason = next((why for part, why in LEFTOVERS.items() if part in name), "it belongs to no LoRA")
            faults.append(f"{name}: {reason}")
    return pairs, faults


def _options(config: Config, ranks: dict[str, int], alphas: dict[str, float], paths: list[str]) -> dict[str, Any]:
    """The method's options. Expressions are written out: what stays in a manifest are names only."""
    targets = "all-linear" if _all_linear(config) else config.target_modules
    layers = config.layers_to_transform
    if config.exclude_modules or config.layers_pattern or not (_all_linear(config) or isinstance(targets, list)):
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
